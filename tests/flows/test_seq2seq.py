"""Sequence to sequence with LoRA: T5 learns to copy, is saved, and answers from the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import graftune as gt
from tests.families import EOS, FAMILIES
from tests.training.runs import args


def rows(count: int) -> list[dict[str, Any]]:
    """Returns texts whose answer is their first token, three times."""
    draw = torch.Generator().manual_seed(0)
    found: list[dict[str, Any]] = []
    for at in range(count):
        ids = torch.randint(5, 13, (3 + at % 3,), generator=draw).tolist()
        found.append({"input_ids": [*ids, EOS], "labels": [ids[0]] * 3 + [EOS]})
    return found


def answers(model: Any, asked: list[dict[str, Any]]) -> list[list[int]]:
    model.eval()
    return [
        model.generate(torch.tensor([row["input_ids"]]), max_new_tokens=4)[0, 1:].tolist()
        for row in asked
    ]


def right(model: Any, asked: list[dict[str, Any]]) -> float:
    found = answers(model, asked)
    return sum(a == r["labels"] for a, r in zip(found, asked, strict=True)) / len(asked)


@pytest.mark.parametrize("checkpointed", [pytest.param(False, marks=pytest.mark.slow), True])
def test_t5_learns_with_lora_in_pieces_and_answers_from_its_file(
    checkpointed: bool, tmp_path: Path
) -> None:
    model = FAMILIES["t5"].build(dropout=0.0)
    gt.attach(model, gt.LoRA(r=16, targets="all-linear", train_head=True), name="copy", seed=0)
    data = rows(96)
    assert right(model, data[:16]) < 0.2
    settings = {"num_train_epochs": 40, "learning_rate": 1e-2, "save_strategy": "no"}
    chosen = args(
        tmp_path,
        per_device_train_batch_size=32,
        gradient_checkpointing=checkpointed,
        **settings,
    )
    gt.Trainer(model, chosen, train_dataset=data, loss_chunk=32).train()
    assert right(model, data[:16]) > 0.8
    gt.adapters(model)["copy"].save(tmp_path / "copy")
    fresh = FAMILIES["t5"].build()
    gt.load(fresh, tmp_path / "copy", name="copy")
    assert answers(fresh, data[:16]) == answers(model, data[:16])
    gt.merge(fresh, "copy")
    assert answers(fresh, data[:16]) == answers(model, data[:16])
