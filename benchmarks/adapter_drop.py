"""AdapterDrop: eight tasks at once with the lowest blocks shared, and training with them dropped.

Also a fusion of eight adapters, whole and pruned to two in each block.
"""

from __future__ import annotations

import copy
import functools
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.lora_step import step
from benchmarks.measure import ROUNDS, Row, row, take_turns
from benchmarks.models import classification_batch, minilm
from graftune.methods.fusion import FusionDelta

TASKS = tuple(f"task{number}" for number in range(8))
DROP = 5
APART, PLAIN = "× 8 runs apart", "× 8 fused as written"


def run(rounds: int = ROUNDS) -> list[Row]:
    found: list[Row] = []
    for name, base in (("MiniLM, 6 blocks", minilm()), ("BERT, 12 blocks", bert(12))):
        found.append(_tasks(name, base, rounds))
        found.append(_training(name, base, rounds))
        found.append(_pruned(name, base, rounds))
    return found


def bert(blocks: int) -> Any:
    """Returns a BERT with random weights, as wide as MiniLM."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=384,
        num_hidden_layers=blocks,
        num_attention_heads=12,
        intermediate_size=1536,
        num_labels=15,
    )
    return BertForSequenceClassification(config)


def with_tasks(base: Any) -> Any:
    """Returns a copy with a Pfeiffer adapter for each task."""
    import graftune as gt

    model = copy.deepcopy(base)
    for seed, task in enumerate(TASKS):
        gt.attach(model, gt.PfeifferAdapter(train_head=False), task, seed=seed)
    return model.eval()


def _tasks(name: str, base: Any, rounds: int) -> Row:
    """Eight tasks on one batch: five blocks shared, against each task on its own."""
    import graftune as gt

    model, batch = with_tasks(base), _inputs()

    def apart() -> None:
        for task in TASKS:
            with gt.using(model, task):
                model(**batch)

    def together() -> None:
        with gt.using(model, gt.Parallel(*TASKS), drop=DROP):
            model(**batch)

    times = _quiet({"apart": apart, "together": together}, rounds)
    ratios = [t["together"] / t["apart"] for t in times]
    return row(
        f"adapter_drop, 8 tasks, {name}",
        ratios,
        1 / 1.39,
        unit=APART,
        note=f"{DROP} blocks shared; the paper's 12 blocks: 1 / 1.39",
    )


def _training(name: str, base: Any, rounds: int) -> Row:
    """A training step with the five lowest blocks dropped, against one with none."""
    import graftune as gt

    batch = classification_batch()
    sides: dict[str, Callable[[], None]] = {}
    for side, drop in (("whole", 0), ("dropped", DROP)):
        model = copy.deepcopy(base)
        gt.attach(model, gt.PfeifferAdapter(), "task", seed=0)
        gt.activate(model, "task", drop=drop)
        sides[side] = step(model, batch)
    times = take_turns(sides, rounds)
    ratios = [t["dropped"] / t["whole"] for t in times]
    return row(
        f"adapter_drop, training, {name}",
        ratios,
        1.0,
        unit="× all blocks",
        note=f"{DROP} lowest blocks dropped",
    )


def _pruned(name: str, base: Any, rounds: int) -> Row:
    """A fusion of eight adapters pruned to two, against all eight as the paper writes them."""
    import graftune as gt

    batch = _inputs()
    model = with_tasks(base)
    gt.attach(model, gt.AdapterFusion(members=TASKS, train_head=False), "fusion", seed=0)
    model.eval()
    whole, plain = copy.deepcopy(model), copy.deepcopy(model)
    for graft in gt.adapters(plain)["fusion"].grafts:
        graft.delta.__class__ = AsWritten
    gt.prune_fusion(model, "fusion", 2, [batch])
    sides = {"plain": plain, "whole": whole, "pruned": model}
    times = _quiet({key: functools.partial(side, **batch) for key, side in sides.items()}, rounds)
    alone = statistics.median(t["whole"] / t["plain"] for t in times)
    return row(
        f"adapter_drop, fusion of 8 pruned to 2, {name}",
        [t["pruned"] / t["plain"] for t in times],
        1 / 1.68,
        unit=PLAIN,
        note=f"ours of all 8: {alone:.2f}; the paper's pruning: 1 / 1.68",
    )


class AsWritten(FusionDelta):
    """The fusion with a key and a value computed of every adapter, as its equation says."""

    def forward(self, h: torch.Tensor, seen: Any) -> torch.Tensor:
        query = F.linear(seen[-1].read, self.query, self.query_bias)
        changes = torch.stack([part.change for part in seen], -2)
        keys = F.linear(changes, self.key, self.key_bias)
        weights = torch.softmax((keys @ query.unsqueeze(-1)).squeeze(-1), -1)
        assert self.value is not None
        values = F.linear(changes, self.value)
        return seen[-1].skip + (weights.unsqueeze(-2) @ values).squeeze(-2)


def _inputs() -> dict[str, torch.Tensor]:
    return {key: value for key, value in classification_batch().items() if key != "labels"}


def _quiet(sides: dict[str, Callable[[], Any]], rounds: int) -> list[dict[str, float]]:
    with torch.no_grad():
        return take_turns(sides, rounds)
