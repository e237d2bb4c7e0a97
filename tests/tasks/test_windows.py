from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graftune.errors import DataError
from graftune.tasks.data import Example
from graftune.tasks.models import load_base
from graftune.tasks.task import Ready
from graftune.tasks.windows import Window, best_spans, of_rows, windows_of
from tests.tasks import tiny

LONG = "my parcel is late please i want the money back now soon"


def example(question: str, context: str) -> Example:
    return Example({"question": question, "context": context}, "", "", "a.jsonl:1")


def made_ready(folder: Path, make: Any, max_length: int) -> Ready:
    base = load_base(str(make(folder)), "question-answering")
    return Ready(base.model, base.tokenizer, [], max_length)


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Ready:
    return made_ready(tmp_path_factory.mktemp("bert"), tiny.bert, 12)


def test_windows_overlap_by_the_stride_and_hold_every_word(ready: Ready) -> None:
    found = windows_of([example("what is it", LONG)], ready, 2)
    words = [[LONG[a:b] for a, b in filter(None, window.places)] for window in found]
    assert all(len(window.features["input_ids"]) <= 12 for window in found)
    assert [one[-2:] for one in words[:-1]] == [two[:2] for two in words[1:]]
    assert words[0] + [word for one in words[1:] for word in one[2:]] == LONG.split()


def test_a_rows_windows_do_not_depend_on_the_other_rows(ready: Ready) -> None:
    rows = [example("what is it", LONG), example("what is it you want", LONG), example("a", "b")]
    alone = [windows_of([one], ready, 4) for one in rows]
    together = windows_of(rows, ready, 4)
    assert [one.row for one in together] == [n for n in range(3) for _ in alone[n]]
    places = [one.places for windows in alone for one in windows]
    assert [one.places for one in together] == places


def test_an_answer_is_labelled_only_where_a_window_holds_all_of_it(ready: Ready) -> None:
    start = LONG.index("money")
    end = start + len("money back")
    for window in windows_of([example("what is it", LONG)], ready, 2):
        first, last = window.tokens_of(start, end)
        held = [LONG[a:b] for a, b in filter(None, window.places)]
        whole = "money" in held and "back" in held
        assert (first > 0) is whole
        if whole:
            tokens = ready.tokenizer.convert_ids_to_tokens(window.features["input_ids"])
            assert tokens[first : last + 1] == ["money", "back"]


def test_a_question_without_room_for_its_passage_is_refused(ready: Ready) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl:1: the question has 10 tokens, which leaves"):
        windows_of([example("what " * 10, "a")], ready, 2)


def test_a_line_break_parts_what_the_tokenizer_does_not(tmp_path: Path) -> None:
    chosen = made_ready(tmp_path, tiny.gpt2, 40)
    (window,) = windows_of([example("what", "yes no")], chosen, 2)
    text = chosen.tokenizer.decode(window.features["input_ids"])
    assert text == "what\nyes no"


def window(places: list[tuple[int, int] | None]) -> Window:
    return Window(0, {}, places)


@given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 6), st.integers(0, 2**31))
def test_best_spans_are_the_best_of_all_valid_ones(
    tokens: int, longest: int, count: int, seed: int
) -> None:
    logits = np.random.default_rng(seed).normal(size=(tokens + 3, 2))
    places: list[tuple[int, int] | None] = [None, None, *((n, n + 1) for n in range(tokens))]
    every = {
        (a, b + 1): logits[a + 2, 0] + logits[b + 2, 1]
        for a in range(tokens)
        for b in range(a, min(a + longest, tokens))
    }
    wanted = sorted(every, key=every.__getitem__, reverse=True)[:count]
    found = best_spans(window(places), logits, longest, count)
    assert [(one.start, one.end) for one in found] == wanted
    assert [one.score for one in found] == pytest.approx([every[place] for place in wanted])


def test_a_rows_windows_count_once_and_no_answer_by_the_least_sure() -> None:
    places = [[None, (0, 1), (1, 2)], [None, (1, 2), (2, 3)]]
    logits = [
        np.array([[1.0, 1.0], [0.0, 0.0], [2.0, 3.0]]),
        np.array([[0.5, 0.0], [4.0, 3.0], [0.0, 0.0]]),
    ]
    ((spans, nowhere),) = of_rows([window(one) for one in places], logits, 1, 1, 9)
    assert [(one.start, one.end, one.score) for one in spans] == [
        (1, 2, 7.0),
        (0, 1, 0.0),
        (2, 3, 0.0),
    ]
    assert nowhere == 0.5
