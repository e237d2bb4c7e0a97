from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from graftune.errors import SettingsError
from graftune.tasks.classification import Classification
from graftune.tasks.data import Example
from graftune.tasks.demonstrations import chosen, nearest_to, text_of, vectors_of, with_vectors
from graftune.tasks.in_context import InContext
from graftune.tasks.models import load_base
from graftune.tasks.settings import Columns
from graftune.tasks.tables import Table
from graftune.tasks.task import Ready
from tests.tasks import tiny

LABELS = ["delivery", "refund"]


def examples(count: int = 40) -> list[Example]:
    task, table = Classification(), Table(tiny.mail(count), "mail.jsonl")
    return task.examples(table, task.columns(table, Columns()))


def rows(seed: int = 0, count: int = 40, **settings: Any) -> list[dict[str, Any]]:
    return chosen(InContext(**settings), examples(count), LABELS, seed)


def test_the_seed_draws_rows_and_their_order() -> None:
    assert rows(shots=6) == rows(shots=6)
    assert rows(shots=6) != rows(1, shots=6)
    known = [one.fields["text"] for one in examples()]
    assert all(row["text"] in known and row["answer"] in LABELS for row in rows(shots=6))


def test_the_order_has_a_seed_of_its_own() -> None:
    first, second = rows(shots=6, order=1), rows(shots=6, order=2)
    assert first != second
    assert sorted(map(text_of, first)) == sorted(map(text_of, second))
    assert rows(shots=6, order=0) == rows(shots=6)


@pytest.mark.parametrize("shots", [6, 7])
def test_balanced_shows_as_many_rows_of_each_label(shots: int) -> None:
    counts = Counter(row["answer"] for row in rows(shots=shots, select="balanced"))
    assert sorted(counts.values()) == [3, shots - 3]


def test_random_labels_leave_the_texts() -> None:
    gold, other = rows(shots=20), rows(shots=20, labels="random")
    assert [row["text"] for row in gold] == [row["text"] for row in other]
    changed = sum(a["answer"] != b["answer"] for a, b in zip(gold, other, strict=True))
    assert 4 <= changed <= 16


def test_random_texts_have_as_many_words_and_leave_the_labels() -> None:
    gold, other = rows(shots=10), rows(shots=10, inputs="random")
    assert [row["answer"] for row in gold] == [row["answer"] for row in other]
    assert all(
        len(a["text"].split()) == len(b["text"].split()) for a, b in zip(gold, other, strict=True)
    )
    words = {word for one in examples() for word in one.fields["text"].split()}
    assert {word for row in other for word in row["text"].split()} <= words
    assert sum(a["text"] != b["text"] for a, b in zip(gold, other, strict=True)) >= 9


def test_more_shots_than_rows_are_refused() -> None:
    with pytest.raises(SettingsError, match=r"shots is 9, but there are only 8 training rows"):
        rows(shots=9, count=8)


def test_rows_without_labels_cannot_be_balanced() -> None:
    found = [Example({"text": "a"}, "a", "", "row 1")]
    with pytest.raises(SettingsError, match="balanced, but the training rows have no labels"):
        chosen(InContext(shots=1, select="balanced"), found, [], 0)


def test_the_nearest_rows_are_shown_the_nearest_last(tmp_path: Path) -> None:
    base = load_base(str(tiny.llama(tmp_path)), "lm")
    ready = Ready(base.model, base.tokenizer, LABELS, 64)
    found = rows(select="nearest", shots=2)
    assert [text_of(row) for row in found] == [one.fields["text"] for one in examples()]
    among = with_vectors(found, ready)
    asked = found[5]["text"]
    (shown,) = nearest_to([asked], 2, among, ready)
    vectors = torch.stack([_mean(base, row["text"]) for row in found])
    centred = torch.nn.functional.normalize(vectors - vectors.mean(dim=0), dim=-1)
    order = (centred @ centred[5]).argsort(descending=True).tolist()
    assert order[0] == 5
    assert shown == [found[order[1]], found[5]]


def _mean(base: Any, text: str) -> torch.Tensor:
    with torch.no_grad():
        ids = base.tokenizer(text, return_tensors="pt")["input_ids"]
        return base.model.model(ids).last_hidden_state[0].mean(dim=0)


@pytest.mark.parametrize("family", ["llama", "t5", "masked_bert"])
def test_every_kind_of_base_has_vectors(family: str, tmp_path: Path) -> None:
    folder = str(getattr(tiny, family)(tmp_path))
    base = load_base(folder, "masked-lm" if family == "masked_bert" else "lm")
    ready = Ready(base.model, base.tokenizer, [], 40)
    found = vectors_of(["hello good day you can", "hello"], ready)
    alone = vectors_of(["hello"], ready)
    assert found.shape == (2, 32)
    torch.testing.assert_close(found[1:], alone, atol=1e-6, rtol=1e-5)
