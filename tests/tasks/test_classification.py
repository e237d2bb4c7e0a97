from typing import Any

import pytest

from graftune.errors import DataError
from graftune.tasks.classification import Classification
from graftune.tasks.data import Example
from graftune.tasks.models import load_base
from graftune.tasks.settings import Columns
from graftune.tasks.tables import Table
from graftune.tasks.task import Ready
from tests.tasks import tiny

TASK = Classification()


def examples(rows: list[dict[str, Any]], **named: str) -> list[Example]:
    table = Table(rows, "mail.csv", list(range(2, len(rows) + 2)))
    return TASK.examples(table, TASK.columns(table, Columns(**named)))


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Ready:
    folder = tiny.bert(tmp_path_factory.mktemp("bert"))
    base = load_base(str(folder), "classification", labels=["delivery", "refund"])
    return Ready(base.model, base.tokenizer, ["delivery", "refund"], 8)


@pytest.mark.parametrize(
    ("row", "fields"),
    [
        ({"utterance": "a", "intent": "x"}, {"text": "a", "label": "x"}),
        (
            {"premise": "a", "hypothesis": "b", "label": 1},
            {"text": "a", "text_pair": "b", "label": "1"},
        ),
        ({"id": "7", "Text": "a", "Label": 1.0}, {"text": "a", "label": "1"}),
    ],
)
def test_usual_columns_are_found(row: dict[str, Any], fields: dict[str, str]) -> None:
    assert examples([row])[0].fields == fields


def test_named_columns_win() -> None:
    rows = [{"text": "a", "body": "b", "label": "x", "kind": "y"}]
    assert examples(rows, text="body", label="kind")[0].fields == {"text": "b", "label": "y"}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": " ", "label": "x"}, 'mail.csv:2: the text ("text") is empty.'),
        ({"text": None, "label": "x"}, 'mail.csv:2: "text" is None, expected a text.'),
        ({"text": "a", "label": ""}, 'mail.csv:2: the label ("label") is missing'),
        ({"text": "a", "label": float("nan")}, "is missing, found nan"),
    ],
)
def test_a_row_without_text_or_label_is_refused(row: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError) as caught:
        examples([row])
    assert said in str(caught.value)


def test_labels_are_sorted_by_number_or_name() -> None:
    numbers = [{"text": "a", "label": n} for n in (10, 9, -1)]
    assert TASK.labels({"train": examples(numbers)}) == ["-1", "9", "10"]


def test_one_label_is_refused() -> None:
    with pytest.raises(DataError, match='All 1 training rows have the label "x"'):
        TASK.labels({"train": examples([{"text": "a", "label": "x"}])})


def test_a_label_that_training_never_sees_is_refused() -> None:
    train = examples([{"text": "a", "label": "refund"}, {"text": "b", "label": "delivery"}])
    test = examples([{"text": "c", "label": "refnud"}])
    with pytest.raises(DataError) as caught:
        TASK.labels({"train": train, "test": test})
    assert str(caught.value) == (
        'mail.csv:2: the test label "refnud" never occurs in the training data. '
        'Did you mean "refund"?'
    )


def test_long_texts_are_cut_and_counted(ready: Ready) -> None:
    rows = [{"text": "hello " * 20, "label": "refund"}, {"text": "hello", "label": "refund"}]
    encoded = TASK.encode(examples(rows), ready)
    assert [len(row["input_ids"]) for row in encoded.features] == [8, 3]
    assert encoded.lengths == [22, 3]
    assert encoded.notes == [
        "1 of 2 texts are longer than 8 tokens (the longest has 22) and were cut."
    ]


def test_pairs_become_two_segments(ready: Ready) -> None:
    rows = [{"text": "hello", "text_pair": "good day", "label": "refund"}]
    row = TASK.encode(examples(rows), ready).features[0]
    ids = ready.tokenizer("hello", "good day")
    assert (row["input_ids"], row["labels"]) == (ids["input_ids"], 1)
    assert row["token_type_ids"] == [0, 0, 0, 1, 1, 1]


def test_answers_keep_the_order_and_are_distributions(ready: Ready) -> None:
    texts = ["hello good day you can", "refund", "where is my parcel"]
    asked = [TASK.question(text, f"row {n}") for n, text in enumerate(texts)]
    found = TASK.answer(asked, ready, batch_size=2, max_new_tokens=1)
    assert [one["text"] for one in found] == texts
    for one in found:
        assert sum(one["probabilities"].values()) == pytest.approx(1)
        assert (
            one["score"] == max(one["probabilities"].values()) == one["probabilities"][one["label"]]
        )


def test_answers_do_not_depend_on_the_batch(ready: Ready) -> None:
    asked = [TASK.question(row["text"], "row") for row in tiny.mail(9)]
    together = TASK.answer(asked, ready, batch_size=9, max_new_tokens=1)
    alone = TASK.answer(asked, ready, batch_size=1, max_new_tokens=1)
    assert [one["label"] for one in together] == [one["label"] for one in alone]
    for a, b in zip(together, alone, strict=True):
        assert a["score"] == pytest.approx(b["score"], abs=1e-6)


def test_a_question_may_be_a_row_without_a_label() -> None:
    row = {"premise": "a", "hypothesis": "b"}
    assert TASK.question(row, "row 1").fields == {"text": "a", "text_pair": "b"}
    with pytest.raises(DataError, match="row 1 has no text column"):
        TASK.question({"x": "a"}, "row 1")
