from pathlib import Path
from typing import Any

import pytest
import torch

from graftune.tasks import head_start
from graftune.tasks.classification import Classification
from graftune.tasks.head_start import start_head
from graftune.tasks.labelling import Labelling
from graftune.tasks.models import load_base
from graftune.tasks.tables import Table
from graftune.tasks.task import Ready
from tests.tasks import tiny

TASK = Classification()


def encoded(ready: Ready) -> dict[str, Any]:
    table = Table(tiny.mail(40), "mail")
    columns = {"text": "text", "label": "label"}
    return {"train": TASK.encode(TASK.examples(table, columns), ready).features}


def test_only_the_new_head_changes_and_it_reads_the_base(tmp_path: Path) -> None:
    base = load_base(str(tiny.bert(tmp_path)), labels=["delivery", "refund"])
    ready = Ready(base.model, base.tokenizer, ["delivery", "refund"], 16)
    before = {name: t.clone() for name, t in base.model.state_dict().items()}
    rows = encoded(ready)
    assert start_head(ready, base.fresh, rows)
    after = base.model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"classifier.weight", "classifier.bias"}
    examples = [TASK.question(row["text"], "row") for row in tiny.mail(40)]
    found = TASK.answer(examples, ready, batch_size=8, max_new_tokens=1)
    right = [a["label"] == row["label"] for a, row in zip(found, tiny.mail(40), strict=True)]
    assert sum(right) > 30


def test_a_head_that_is_not_new_is_left(tmp_path: Path) -> None:
    base = load_base(str(tiny.bert(tmp_path)), labels=["delivery", "refund"])
    ready = Ready(base.model, base.tokenizer, ["delivery", "refund"], 16)
    before = base.model.get_parameter("classifier.weight").clone()
    assert not start_head(ready, (), encoded(ready))
    assert torch.equal(before, base.model.get_parameter("classifier.weight"))
    assert not list(base.model.get_submodule("classifier")._forward_pre_hooks)


def test_a_head_for_words_reads_the_labelled_tokens(tmp_path: Path) -> None:
    task, labels = Labelling(), ["O", "B-sum", "I-sum", "B-thing", "I-thing"]
    base = load_base(str(tiny.bert(tmp_path)), "token-classification", labels=labels)
    ready = Ready(base.model, base.tokenizer, labels, 16)
    table = Table(tiny.tagged(40), "rows")
    examples = task.examples(table, {"words": "tokens", "tags": "ner_tags"})
    rows = task.encode(examples, ready).features
    assert start_head(ready, base.fresh, {"train": rows, "validation": rows[::3]})
    answers = task.answer(examples, ready, batch_size=8, max_new_tokens=1)
    assert task.measure(examples, answers, labels).metrics["token_accuracy"] > 0.9


def test_a_head_for_words_is_fitted_to_as_many_rows_as_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_start, "MOST_WORDS", 10)
    rows = [{"labels": [-100, 0, 1, 2, -100], "input_ids": [n] * 5} for n in range(20)]
    assert [row["input_ids"][0] for row in head_start._chosen(rows)] == [0, 6, 12, 18]
