"""Numbers for texts: rows, metrics against scipy and scikit-learn, a run from end to end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
import torch

from graftune.errors import DataError
from graftune.tasks import metrics, run, workspace
from graftune.tasks.data import Example
from graftune.tasks.models import load_base
from graftune.tasks.regression import Regression
from graftune.tasks.settings import Columns, RunSettings
from graftune.tasks.tables import Table
from graftune.tasks.task import Ready
from tests.tasks import tiny

TASK = Regression()


def examples(rows: list[dict[str, Any]], **named: str) -> list[Example]:
    table = Table(rows, "pairs.csv", list(range(2, len(rows) + 2)))
    return TASK.examples(table, TASK.columns(table, Columns(**named)))


def rated(count: int = 60) -> list[dict[str, Any]]:
    """Texts whose number is how many of their words are "money", from 0 to 2."""
    return [
        {
            "text": f"{row['text'].rpartition(' ')[0]} {' '.join(['money'] * (i % 3))} now",
            "score": i % 3,
        }
        for i, row in enumerate(tiny.mail(count))
    ]


@pytest.mark.parametrize(
    ("row", "fields"),
    [
        ({"text": "a", "score": "1.5"}, {"text": "a", "value": 1.5}),
        (
            {"sentence1": "a", "sentence2": "b", "label": 4},
            {"text": "a", "text_pair": "b", "value": 4.0},
        ),
    ],
)
def test_usual_columns_are_found(row: dict[str, Any], fields: dict[str, Any]) -> None:
    assert examples([row])[0].fields == fields


@pytest.mark.parametrize("value", ["much", None, "", float("nan"), float("inf"), True])
def test_what_is_no_number_is_refused_with_its_line(value: Any) -> None:
    with pytest.raises(DataError, match=r'pairs\.csv:2: the value \("score"\) is .* a number'):
        examples([{"text": "a", "score": value}])


def test_a_constant_is_refused_and_large_values_are_remarked() -> None:
    same = examples([{"text": "a", "score": 1}, {"text": "b", "score": 1}])
    with pytest.raises(DataError, match="All 2 training rows have the value 1"):
        TASK.labels({"train": same})
    assert TASK.remarks(same) == []
    large = examples([{"text": "a", "score": 100}, {"text": "b", "score": 300}])
    assert "a mean of 200 and a standard deviation of 100" in TASK.remarks(large)[0]


def test_metrics_equal_those_of_scipy_and_scikit_learn() -> None:
    draw = np.random.default_rng(0)
    said, right = draw.normal(size=50).round(1), draw.integers(0, 4, 50).astype(float)
    found = TASK.score(said, right)
    assert found["pearson"] == pytest.approx(scipy.stats.pearsonr(said, right).statistic)
    assert found["spearman"] == pytest.approx(scipy.stats.spearmanr(said, right).statistic)
    assert found["rmse"] == pytest.approx(sklearn.metrics.root_mean_squared_error(right, said))
    assert found["mae"] == pytest.approx(sklearn.metrics.mean_absolute_error(right, said))
    assert metrics.pearson(np.ones(50), right) == 0.0


@pytest.mark.parametrize(("kind", "size"), [(tiny.bert, 1), (tiny.bert, 3), (tiny.llama, 3)])
def test_the_loss_is_the_mean_squared_error(kind: Any, size: int, tmp_path: Path) -> None:
    base = load_base(str(kind(tmp_path / "base")), "regression")
    assert base.fresh[-1] in ("classifier.weight", "score.weight")
    ready = Ready(base.model, base.tokenizer, [], 16)
    rows = examples(rated(size + 1)[1:])
    batch = TASK.collate(ready)(TASK.encode(rows, ready).features)
    out = TASK.forward(base.model, batch)
    right = torch.tensor([float(row.fields["value"]) for row in rows])
    assert torch.allclose(out["loss"], (out["logits"][:, 0] - right).square().mean())


def test_a_run_learns_and_a_new_process_answers_alike(tmp_path: Path) -> None:
    data = tiny.write_jsonl(tmp_path / "rated.jsonl", rated(90))
    settings = RunSettings(
        base=str(tiny.bert(tmp_path / "base")), task="regression", data=str(data), method="lora",
        train={"epochs": 20, "lr": 0.01, "batch_size": 8}, out=str(tmp_path / "run"),
    )  # fmt: skip
    result = run.train(settings)
    found = result.metrics["test"]
    assert found["pearson"] > 0.8
    assert set(result.metrics["validation"]) >= {"loss", "pearson", "spearman", "rmse", "mae"}
    again = run.evaluate(tmp_path / "run", data=None)
    assert again["metrics"] == pytest.approx(found)
    asked = [row["text"] for row in rated(6)]
    here = run.predict(tmp_path / "run", asked)
    told = subprocess.run(
        [
            *(sys.executable, "-c", "from graftune.cli import main; main()"),
            *("predict", tmp_path / "run", "--json", *asked),
        ],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    there = json.loads(told.stdout)
    assert [one["text"] for one in there] == asked
    assert [one["value"] for one in there] == pytest.approx([one["value"] for one in here])
    kept = json.loads((tmp_path / "run" / workspace.PREDICTIONS).read_text().splitlines()[0])
    assert set(kept) == {"text", "value", "true"}


def test_the_command_line_trains_and_shows_numbers(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from graftune.cli.app import app

    base, data = tiny.bert(tmp_path / "bert"), tmp_path / "rated.jsonl"
    tiny.write_jsonl(data, rated(30))
    call = ["train", "--base", base, "--task", "regression", "--data", data, "--steps", 2]
    out = tmp_path / "run"
    ended = CliRunner().invoke(app, [str(word) for word in [*call, "--out", out]])
    assert ended.exit_code == 0, ended.output
    assert "Pearson correlation" in (out / "report.html").read_text(encoding="utf-8")
    shown = CliRunner().invoke(app, ["predict", str(out), "where is my money"])
    assert shown.stdout.split()[:2] == ["value", "text"]
    assert shown.stdout.rstrip().endswith("where is my money")
