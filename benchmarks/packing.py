"""Packed conversations beside batches of like length: tokens trained on a second, SmolLM2, LoRA.

Not among the ratios of `python -m benchmarks`, since it is given the data: rows of instruction,
context and answer, of which the first are taken. Each round trains on all of them both ways, in
turns: `python -m benchmarks.packing --data FILE [--rows 64] [--limit 512] [--rounds 3]`.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.measure import single_thread


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--limit", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4, help="conversations in a padded batch")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    os.environ.update(single_thread())
    import torch

    torch.set_num_threads(1)
    padded, packed, tokens, said = _batches(options)
    print(said)
    step = _step()
    ratios: list[float] = []
    for _ in range(options.rounds):
        a, b = _seconds(step, padded), _seconds(step, packed)
        ratios.append(a / b)
        print(f"padded {tokens / a:.0f} tokens/s, packed {tokens / b:.0f} tokens/s, {a / b:.2f}")
    print(f"packed is {median(ratios):.2f} times as fast, {min(ratios):.2f} … {max(ratios):.2f}")


def _batches(options: Any) -> tuple[list[Any], list[Any], int, str]:
    """Returns batches of like length, packed ones, the tokens of either, and what they hold."""
    from graftune.tasks import packing, tables
    from graftune.tasks.batches import collator
    from graftune.tasks.models import load_base
    from graftune.tasks.settings import Columns
    from graftune.tasks.task import Ready, find_task
    from graftune.training.lengths import LengthBatches

    base = load_base("demo:smollm2", "causal-lm")
    task, table = find_task("instruct"), tables.read_table(options.data)
    table = tables.Table(table.rows[: options.rows], table.source)
    ready = Ready(base.model, base.tokenizer, [], options.limit)
    task.prepare(base.tokenizer)
    examples = task.examples(table, task.columns(table, Columns()))
    rows = task.encode(examples, ready).features
    lengths = [len(row["input_ids"]) for row in rows]
    order = list(LengthBatches(lengths, options.batch))
    plain = collator(ready)
    padded = [
        plain([rows[at] for at in order[first : first + options.batch]])
        for first in range(0, len(order), options.batch)
    ]
    full = packing.pack(rows, options.limit)
    packed = [packing.collator(plain)([row]) for row in full]
    computed = sum(batch["input_ids"].numel() for batch in padded)
    said = (
        f"{packing.summary(full, len(rows))} Padded batches are {sum(lengths) / computed:.0%} full."
    )
    return padded, packed, sum(lengths), said


def _step() -> Any:
    import graftune as gt
    from graftune.tasks.models import load_base

    model = load_base("demo:smollm2", "causal-lm").model
    adapter = gt.attach(model, gt.LoRA(r=8), "x", seed=0)
    model.train()

    def step(batch: dict[str, Any]) -> None:
        model(**batch).loss.backward()
        for one in adapter.parameters():
            one.grad = None

    return step


def _seconds(step: Any, batches: Sequence[dict[str, Any]]) -> float:
    began = time.perf_counter()
    for batch in batches:
        step(batch)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
