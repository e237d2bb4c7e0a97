"""AdaLoRA on tiny models, for its tests: attached, counted, and trained by a bare loop."""

from __future__ import annotations

from typing import Any

import torch

import graftune as gt
from graftune.methods.adalora import triplets_of
from tests.families import FAMILIES

STEPS = 12
SMALL: dict[str, Any] = {"r": 4, "target_r": 2}


def attached(family: str = "bert", **settings: Any) -> tuple[Any, gt.Adapter]:
    model = FAMILIES[family].build()
    return model, gt.attach(model, gt.AdaLoRA(**{**SMALL, **settings}), seed=0)


def kept(adapter: gt.Adapter) -> int:
    return sum(int((one.Lambda != 0).sum()) for one in triplets_of(adapter))


def budget(adapter: gt.Adapter, rank: int = 2) -> int:
    return rank * sum(one.P[..., 0, 0].numel() for one in triplets_of(adapter))


def step_on(
    model: Any, adapter: gt.Adapter, steps: int, total: int = STEPS, first: int = 1
) -> None:
    """Takes steps of a loop of one's own, with a loss that all triplets can lower."""
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    inputs = FAMILIES["bert"].inputs()
    adapter.begin(total)
    model.train()
    for step in range(first, first + steps):
        (model(**inputs).logits.pow(2).mean() + adapter.penalty()).backward()
        optimizer.step()
        adapter.advance(step)
        optimizer.zero_grad()
    model.eval()
