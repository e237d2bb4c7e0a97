"""A whole training step, forward to optimizer, with LoRA on all linears of the blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from benchmarks.measure import ROUNDS, Row, row, take_turns
from benchmarks.models import (
    classification_batch,
    language_batch,
    minilm,
    smollm2,
    with_ours,
    with_peft,
)


def run(rounds: int = ROUNDS) -> list[Row]:
    found = [_compared("MiniLM", minilm(), "SEQ_CLS", classification_batch(), max(rounds, 9), 2)]
    found.append(_compared("SmolLM2", smollm2(), "CAUSAL_LM", language_batch(), rounds, 1))
    return found


def _compared(
    name: str, base: Any, task: str, batch: Mapping[str, Any], rounds: int, repeat: int
) -> Row:
    sides = {"ours": step(with_ours(base), batch), "peft": step(with_peft(base, task), batch)}
    times = take_turns(sides, rounds, repeat=repeat)
    rows, tokens = batch["input_ids"].shape
    ratios = [t["ours"] / t["peft"] for t in times]
    return row(f"lora_step, {name}", ratios, 1.0, note=f"{rows} rows of {tokens} tokens")


def step(model: Any, batch: Mapping[str, Any]) -> Callable[[], None]:
    """Returns a call that takes one step on the batch."""
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def take() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return take
