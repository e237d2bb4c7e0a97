"""The messages of the whole job: a share of the help-desk's, the same for both sides."""

from __future__ import annotations

import json
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "src" / "graftune" / "examples" / "helpdesk"
COUNT = 150
EPOCHS = 10
BATCH = 16
RATE = 2e-3
RANK = 8


def rows(split: str) -> list[dict[str, str]]:
    """Returns the rows of a split; of the training split the first `COUNT`."""
    lines = (FOLDER / f"{split}.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return found[:COUNT] if split == "train" else found


def labels() -> list[str]:
    """Returns the labels, sorted."""
    return sorted({row["label"] for row in rows("test")})
