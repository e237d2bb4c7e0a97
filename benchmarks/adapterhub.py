"""A Pfeiffer adapter's added latency and training step beside the AdapterHub library's.

That library pins another transformers, so it runs in a Python of its own, named by the environment
variable GRAFTUNE_ADAPTERHUB_PYTHON; the two take turns, on the same base and adapter tensors.

    python -m venv hub && hub/bin/pip install torch adapters
    GRAFTUNE_ADAPTERHUB_PYTHON=hub/bin/python python -m benchmarks adapterhub
"""

from __future__ import annotations

import copy
import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.lora_step import step
from benchmarks.measure import ROUNDS, Row, cpu_seconds, row

TURNS = 5
LEAST = 8
"""Times of which the least is taken: other work on the machine only ever adds."""
UNIT = "× AdapterHub"


def run(rounds: int = ROUNDS) -> list[Row]:
    python = os.environ.get("GRAFTUNE_ADAPTERHUB_PYTHON")
    if not python:
        print("  (left out: GRAFTUNE_ADAPTERHUB_PYTHON names no Python with `adapters`)")
        return []
    with tempfile.TemporaryDirectory() as folder:
        script = str(Path(__file__).with_name("adapterhub_side.py"))
        side = subprocess.Popen(
            [python, script, folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            return _turns(side, folder, max(rounds, 9))
        finally:
            side.kill()


def _turns(side: subprocess.Popen[str], folder: str, rounds: int) -> list[Row]:
    assert side.stdin is not None
    assert side.stdout is not None
    count, *logits = map(float, side.stdout.readline().split())
    ours, difference = _ours(folder, count, logits)

    def theirs(what: str) -> float:
        side.stdin.write(f"{what}\n")  # type: ignore[union-attr]
        side.stdin.flush()  # type: ignore[union-attr]
        return float(side.stdout.readline())  # type: ignore[union-attr]

    def turn(what: str) -> tuple[float, float]:
        call, turns = ours[what], 1 if what == "step" else TURNS
        call()
        return min(cpu_seconds(call, turns) for _ in range(LEAST)), theirs(what)

    added: list[tuple[float, float]] = []
    steps: list[tuple[float, float]] = []
    for _ in range(rounds):
        base, adapter = turn("base"), turn("adapter")
        added.append((adapter[0] - base[0], adapter[1] - base[1]))
        steps.append(turn("step"))
    micro = [sorted(pair[at] for pair in added)[rounds // 2] * 1e6 for at in (0, 1)]
    return [
        row(
            "adapterhub, added latency",
            [mine / other for mine, other in added],
            0.6,
            unit=UNIT,
            note=f"16 tokens, 6 blocks: {micro[0]:.0f} µs against {micro[1]:.0f} µs; logits differ "
            f"by {difference:.0e}",
        ),
        row(
            "adapterhub, training step",
            [mine / other for mine, other in steps],
            1.0,
            unit=UNIT,
            note=f"16 rows of 32 tokens, {count:,.0f} trained there",
        ),
    ]


def _ours(
    folder: str, count: float, logits: list[float]
) -> tuple[dict[str, Callable[[], Any]], float]:
    """Returns our calls by name, and how far our logits are from theirs."""
    from transformers import BertForSequenceClassification

    import graftune as gt

    torch.set_num_threads(1)
    model = BertForSequenceClassification.from_pretrained(f"{folder}/base").eval()
    plain = copy.deepcopy(model)
    adapter = gt.load(model, f"{folder}/task", name="task", head=False)
    assert adapter.count() == count, "the two sides train different tensors"
    torch.manual_seed(1)
    ids = torch.randint(1000, 20000, (16, 32))
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones(16, 32, dtype=torch.long),
        "labels": torch.randint(0, 15, (16,)),
    }

    few = {"input_ids": ids[:1, :16]}

    def forward(which: Any) -> None:
        with torch.no_grad():
            which(**few)

    with torch.no_grad():
        mine = model(**few).logits.flatten()
    difference = (mine - torch.tensor(logits)).abs().max().item()
    take = step(model, batch)

    def train() -> None:
        model.train()
        take()
        model.eval()

    model.eval()
    calls = {"base": lambda: forward(plain), "adapter": lambda: forward(model), "step": train}
    return calls, difference
