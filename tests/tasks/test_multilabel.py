"""Sets of labels: rows, metrics against scikit-learn, a run from end to end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn.metrics
import torch
from typer.testing import CliRunner

from graftune.cli.app import app
from graftune.errors import DataError, SettingsError
from graftune.tasks import run
from graftune.tasks.data import Example
from graftune.tasks.models import load_base
from graftune.tasks.multilabel import Multilabel, MultilabelOptions
from graftune.tasks.settings import Columns
from graftune.tasks.tables import Table
from graftune.tasks.task import Ready, find_task
from tests.tasks import tiny

TASK = Multilabel()


def examples(rows: list[dict[str, Any]], task: Multilabel = TASK) -> list[Example]:
    table = Table(rows, "mail.csv", list(range(2, len(rows) + 2)))
    return task.examples(table, task.columns(table, Columns()))


def sets(count: int = 80) -> list[dict[str, Any]]:
    """Texts with the labels whose words they hold."""
    words = {"delivery": "parcel", "refund": "money", "thanks": "hello"}
    rows: list[dict[str, Any]] = []
    for i, row in enumerate(tiny.mail(count)):
        held = [label for bit, label in enumerate(words) if i >> bit & 1]
        start = row["text"].rpartition(" ")[0].replace("hello", "yes")
        rows.append({"text": " ".join([start, *map(words.get, held)]), "labels": held})
    return rows


@pytest.mark.parametrize(
    ("cell", "found"),
    [
        (["b", "a", "b"], ["a", "b"]),
        ("b, a", ["a", "b"]),
        ('["b", "a, c"]', ["a, c", "b"]),
        ("['b', 'a']", ["a", "b"]),
        ("", []),
        (None, []),
        ([], []),
        (10, ["10"]),
        ([10, 9.0], ["9", "10"]),
    ],
)
def test_cells_are_read_as_sets(cell: Any, found: list[str]) -> None:
    assert examples([{"text": "x", "labels": cell}])[0].fields["labels"] == found


def test_the_separator_is_a_setting() -> None:
    task = find_task("multilabel", {"separator": "|"})
    assert examples([{"text": "x", "labels": "b|a, c"}], task)[0].fields["labels"] == ["a, c", "b"]
    with pytest.raises(SettingsError, match=r"task_options\.separator is"):
        find_task("multilabel", {"separator": ""})


@pytest.mark.parametrize(
    ("cell", "said"),
    [
        (True, r'mail\.csv:2: the labels \("labels"\) are True, expected a list'),
        ({"a": 1}, "expected a list"),
        (["a", None], r'mail\.csv:2: one of the labels \("labels"\) is empty'),
    ],
)
def test_what_is_no_set_is_refused_with_its_line(cell: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        examples([{"text": "x", "labels": cell}])


def test_labels_that_training_never_sees_are_refused() -> None:
    train = examples([{"text": "x", "labels": "refund,delivery"}])
    test = examples([{"text": "y", "labels": "refnud"}])
    with pytest.raises(DataError, match=r'"refnud" never occurs.*Did you mean "refund"'):
        TASK.labels({"train": train, "test": test})
    with pytest.raises(DataError, match='"refnud" is not one that the run was trained on'):
        TASK.check_known(test, ["refund"])
    with pytest.raises(DataError, match="have 1 labels in all"):
        TASK.labels({"train": examples([{"text": "x", "labels": "refund"}])})


def test_rows_with_one_label_each_are_remarked() -> None:
    assert "no row has two labels" in TASK.remarks(examples([{"text": "x", "labels": "a;b"}]))[1]
    assert TASK.remarks(
        examples([{"text": "x", "labels": "a,b"}, {"text": "y", "labels": ""}])
    ) == ["1 labels a row, 2 at most; 1 of 2 rows have none."]


def test_metrics_equal_those_of_scikit_learn() -> None:
    draw = np.random.default_rng(0)
    said, right = draw.random((40, 5)) > 0.5, draw.random((40, 5)) > 0.5
    said[:, 4] = right[:, 4] = False
    said[:9], right[:9] = right[:9], right[:9]
    found = TASK.score(said, right)
    for name in ("micro", "macro"):
        expected = sklearn.metrics.f1_score(right, said, average=name, zero_division=0)
        assert found[f"{name}_f1"] == pytest.approx(expected)
    assert found["subset_accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(right, said))
    assert found["subset_accuracy"] > 0


def test_the_loss_is_the_binary_cross_entropy_and_answers_keep_to_the_threshold(
    tmp_path: Path,
) -> None:
    labels = ["delivery", "refund", "thanks"]
    base = load_base(str(tiny.bert(tmp_path / "bert")), "multilabel", labels=labels)
    ready = Ready(base.model, base.tokenizer, labels, 16)
    rows = examples(sets(5))
    batch = TASK.collate(ready)(TASK.encode(rows, ready).features)
    out = TASK.forward(base.model, batch)
    p = out["logits"].sigmoid()
    right = torch.tensor(
        [[float(label in row.fields["labels"]) for label in labels] for row in rows]
    )
    assert torch.allclose(out["loss"], -(right * p.log() + (1 - right) * (1 - p).log()).mean())
    middle = float(p.detach().median())
    task = Multilabel(MultilabelOptions(threshold=middle))
    for one, chances in zip(
        task.answer(rows, ready, batch_size=2, max_new_tokens=1), p.tolist(), strict=True
    ):
        assert list(one["probabilities"].values()) == pytest.approx(chances, abs=1e-6)
        assert set(one["labels"]) == {
            label for label in labels if one["probabilities"][label] > middle
        }


def test_a_run_learns_is_measured_again_and_shown(tmp_path: Path) -> None:
    data, out = tiny.write_jsonl(tmp_path / "mail.jsonl", sets(80)), tmp_path / "run"
    call = [
        *("train", "--base", tiny.bert(tmp_path / "bert"), "--task", "multilabel", "--data", data),
        *("--method", "full", "--epochs", 15, "--lr", "5e-3", "--batch-size", 8, "--out", out),
    ]
    ended = CliRunner().invoke(app, [str(word) for word in call])
    assert ended.exit_code == 0, ended.output
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "micro F1" in page
    assert "delivery" in page
    again = run.evaluate(out, data=None)
    assert again["metrics"]["micro_f1"] > 0.8
    assert [one["label"] for one in again["classes"]] == ["delivery", "refund", "thanks"]
    text = sets(8)[7]["text"]
    shown = CliRunner().invoke(app, ["predict", str(out), text])
    assert shown.stdout.split()[:2] == ["labels", "text"]
    assert ", ".join(run.predict(out, [text])[0]["labels"]) in shown.stdout
