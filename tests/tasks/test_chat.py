from pathlib import Path
from typing import Any

import pytest

from graftune.errors import DataError
from graftune.tasks.chat import (
    IGNORED,
    Turns,
    end_tokens,
    prompt_tokens,
    render,
    shorten,
    shorten_prompt,
    tokens_of,
)
from graftune.tasks.models import load_base
from tests.tasks import tiny

ENDS = frozenset({3})


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_base(str(tiny.llama(tmp_path_factory.mktemp("llama"))), "causal-lm")


def labelled(tokenizer: Any, turns: Turns) -> str:
    return tokenizer.decode([label for label in turns.labels if label != IGNORED])


def test_only_the_answer_and_its_end_token_are_labelled(base: Any) -> None:
    turns = tokens_of(base.tokenizer, [user("say hello"), assistant("good day")], ENDS)
    assert labelled(base.tokenizer, turns).split() == ["good", "day<|im_end|>"] or (
        [t for t in turns.labels if t != IGNORED]
        == base.tokenizer.convert_tokens_to_ids(["good", "day", "<|im_end|>"])
    )
    assert turns.closed


def test_every_answer_of_several_turns_is_labelled(base: Any) -> None:
    messages = [user("say"), assistant("yes"), user("hello"), assistant("no now")]
    turns = tokens_of(base.tokenizer, messages, ENDS)
    said = base.tokenizer.convert_tokens_to_ids(["yes", "<|im_end|>", "no", "now", "<|im_end|>"])
    assert [label for label in turns.labels if label != IGNORED] == said
    assert [i for i, t in zip(turns.ids, turns.labels, strict=True) if t != IGNORED] == said


def test_a_prompt_is_what_training_saw_before_the_answer(base: Any) -> None:
    turns = tokens_of(base.tokenizer, [user("say hello"), assistant("good day")], ENDS)
    start = next(i for i, label in enumerate(turns.labels) if label != IGNORED)
    assert prompt_tokens(base.tokenizer, [user("say hello")]) == turns.ids[:start]


def test_a_template_that_closes_nothing_gets_an_end_token(base: Any, tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m['content'] + '\n' }}{% endfor %}"
    other = load_base(str(tiny.llama(tmp_path, template=template)), "causal-lm").tokenizer
    turns = tokens_of(other, [user("say"), assistant("yes")], ENDS)
    assert not turns.closed
    assert turns.ids[-1] == turns.labels[-1] == other.eos_token_id


def test_a_template_that_rewrites_earlier_turns_is_refused(base: Any, tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ loop.revindex0 ~ ' ' ~ m['content'] + '\n' }}{% endfor %}"
    other = load_base(str(tiny.llama(tmp_path, template=template)), "causal-lm").tokenizer
    messages = [user("say"), assistant("yes"), user("say"), assistant("no")]
    with pytest.raises(DataError, match="rewrites earlier turns"):
        tokens_of(other, messages, ENDS)


def test_a_template_that_refuses_says_so(base: Any, tmp_path: Path) -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    other = load_base(str(tiny.llama(tmp_path, template=template)), "causal-lm").tokenizer
    with pytest.raises(DataError, match="refuses the turns user, user: roles must alternate"):
        render(other, [user("a"), user("b")], ask=True)


def test_end_tokens_are_the_tokenizers_and_the_models(base: Any) -> None:
    before = base.model.generation_config.eos_token_id
    base.model.generation_config.eos_token_id = [5, 3]
    try:
        assert end_tokens(base.tokenizer, base.model) == {3, 5}
    finally:
        base.model.generation_config.eos_token_id = before


def row(prompt: int, answer: int, later: int = 0) -> Turns:
    ids = list(range(prompt + answer + later))
    labels = [IGNORED] * prompt + ids[prompt : prompt + answer] + [IGNORED] * later
    return Turns(ids, labels, True)


@pytest.mark.parametrize(
    ("turns", "limit", "lost", "labels"),
    [
        (row(4, 3), 7, "", 3),
        (row(4, 3, 5), 8, "later turns", 3),
        (row(40, 3), 20, "part of the prompt", 3),
        (row(40, 18), 20, "part of the answer", 15),
        (row(2, 50), 20, "part of the answer", 18),
        (row(100, 100), 20, "part of the answer", 15),
    ],
)
def test_shortening_never_drops_the_whole_answer(
    turns: Turns, limit: int, lost: str, labels: int
) -> None:
    short, said = shorten(turns, limit)
    assert said == lost
    assert len(short.ids) == len(short.labels) == min(limit, len(turns.ids))
    assert sum(label != IGNORED for label in short.labels) == labels
    assert all(i == t for i, t in zip(short.ids, short.labels, strict=True) if t != IGNORED)


def test_a_shortened_prompt_keeps_its_beginning_and_end() -> None:
    assert shorten_prompt(range(10), 5) == [0, 1, 7, 8, 9]
    assert shorten_prompt(range(3), 5) == [0, 1, 2]
