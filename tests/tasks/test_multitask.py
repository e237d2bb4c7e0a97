"""Several tasks' classification: each row among its own task's labels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from graftune.errors import DataError
from graftune.tasks import run
from graftune.tasks.data import Example
from graftune.tasks.models import load_base
from graftune.tasks.multitask import Multitask
from graftune.tasks.settings import RunSettings
from graftune.tasks.task import Ready
from tests.tasks import tiny

TASK = Multitask()
LABELS = ["a/no", "a/yes", "b/no", "b/perhaps", "b/yes"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.bert(tmp_path_factory.mktemp("bases") / "bert"))


@pytest.fixture
def ready(base: str) -> Ready:
    found = load_base(base, "classification", labels=LABELS)
    return Ready(found.model.eval(), found.tokenizer, LABELS, 16)


def example(text: str, label: str) -> Example:
    return Example({"text": text, "label": label}, text, label, "row 1")


def test_a_rows_loss_is_that_of_its_own_tasks_head(ready: Ready) -> None:
    rows = TASK.encode([example("my parcel", "a/yes"), example("my money", "b/no")], ready).features
    batch = TASK.collate(ready)(rows)
    found = TASK.forward(ready.model, dict(batch))
    logits = ready.model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    alone = torch.nn.functional.cross_entropy
    wanted = (
        alone(logits[:1, :2], torch.tensor([1])) + alone(logits[1:, 2:], torch.tensor([0]))
    ) / 2
    assert torch.allclose(found["loss"], wanted)
    assert found["logits"][0, 2:].isinf().all()
    found["loss"].backward()
    for part in (ready.model.classifier.weight, ready.model.bert.embeddings.word_embeddings.weight):
        assert part.grad is not None
        assert part.grad.isfinite().all()


def test_answers_are_among_the_labels_of_the_rows_task_and_sum_to_one(ready: Ready) -> None:
    rows = [example("my parcel", "a/yes"), example("my money", "b/no")]
    answers = TASK.answer(rows, ready, batch_size=2, max_new_tokens=1)
    assert [set(one["probabilities"]) for one in answers] == [set(LABELS[:2]), set(LABELS[2:])]
    for one in answers:
        assert sum(one["probabilities"].values()) == pytest.approx(1)
        assert one["score"] == max(one["probabilities"].values())
    with pytest.raises(DataError, match="nothing says which task the text is of"):
        TASK.answer([example("my parcel", "")], ready, batch_size=2, max_new_tokens=1)


def test_labels_name_their_task() -> None:
    with pytest.raises(DataError, match='row 1: the label is "yes", expected "TASK/LABEL"'):
        TASK.labels({"train": [example("my parcel", "yes")]})


def test_several_tasks_train_in_one_run(base: str, tmp_path: Path) -> None:
    rows = [{**row, "label": f"{task}/{row['label']}"} for task in "ab" for row in tiny.mail(40)]
    settings = RunSettings(
        base=base, task="multitask", data=str(tiny.write_jsonl(tmp_path / "mail.jsonl", rows)),
        method={"name": "lora", "r": 4}, train={"epochs": 20, "lr": 0.005},
        out=str(tmp_path / "run"),
    )  # fmt: skip
    found = run.train(settings)
    assert len(found.labels) == 4
    assert found.metrics["test"]["accuracy"] > 0.8
