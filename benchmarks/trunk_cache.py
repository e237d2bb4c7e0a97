"""Ten epochs with what the trunk computes kept, against without, and against HF PEFT."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import torch

import graftune as gt
from benchmarks.measure import ROUNDS, Row, row, take_turns
from benchmarks.models import RANK, minilm

EPOCHS, ROWS, BATCH, TOKENS = 10, 96, 16, 32
TOP = {"the last 2 of 6": (4, 5), "the last of 6": (5,)}


def run(rounds: int = ROUNDS) -> list[Row]:
    base, data = minilm(), batches()
    sides = {
        "ladder, kept": _ours(base, data, gt.LadderSideTuning(), kept=True),
        "ladder": _ours(base, data, gt.LadderSideTuning(), kept=False),
        "peft": _peft(base, data, None),
    }
    for which, layers in TOP.items():
        sides[which] = _ours(base, data, gt.LoRA(r=RANK, layers=layers), kept=True)
        sides[f"peft, {which}"] = _peft(base, data, list(layers))
    times = take_turns(sides, min(rounds, 3))
    pairs = (
        ("Ladder Side-Tuning", "ladder, kept", "ladder", "× without the cache", 0.35),
        ("Ladder Side-Tuning", "ladder, kept", "peft", "× PEFT's LoRA", 0.20),
        *((f"LoRA in {which}", which, f"peft, {which}", "× PEFT's", 0.55) for which in TOP),
    )
    note = f"{EPOCHS} epochs of {ROWS} texts of the demo, {BATCH} × {TOKENS} tokens"
    return [
        row(f"trunk_cache, {what}", [t[mine] / t[other] for t in times], most, unit=unit, note=note)
        for what, mine, other, unit, most in pairs
    ]


def batches() -> list[dict[str, Any]]:
    """Returns the demo's first texts as batches of one size."""
    from graftune.cli.demo import examples
    from graftune.tasks.models import load_base

    lines = (examples("helpdesk") / "train.jsonl").read_text().splitlines()[:ROWS]
    rows = [json.loads(line) for line in lines]
    names = sorted({one["label"] for one in rows})
    tokenizer: Any = load_base("demo:minilm", "feature").tokenizer
    found: list[dict[str, Any]] = []
    for start in range(0, ROWS, BATCH):
        some = rows[start : start + BATCH]
        texts = [one["text"] for one in some]
        options: dict[str, Any] = {"padding": "max_length", "truncation": True}
        made = tokenizer(texts, max_length=TOKENS, return_tensors="pt", **options)
        labels = torch.tensor([names.index(one["label"]) % 2 for one in some])
        found.append({**made, "labels": labels})
    return found


def _ours(base: Any, data: list[dict[str, Any]], method: Any, *, kept: bool) -> Callable[[], Any]:
    model = copy.deepcopy(base)
    gt.attach(model, method, seed=0)

    def job() -> None:
        if not kept:
            _train(model, data)
            return
        with tempfile.TemporaryDirectory() as folder:  # empty each time: its filling counts
            _train(model, data, gt.TrunkCache(model, folder, still=True).passing)

    return job


def _peft(base: Any, data: list[dict[str, Any]], layers: list[int] | None) -> Callable[[], Any]:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="SEQ_CLS",
        r=RANK,
        target_modules=["query", "value"],
        layers_to_transform=layers,
    )
    model = get_peft_model(copy.deepcopy(base), config)
    return lambda: _train(model, data)


def _train(model: Any, data: list[dict[str, Any]], passing: Any = None) -> None:
    """Trains for the epochs, with an optimizer of its own."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    model.train()
    for batch in _all(data):
        if passing is None:
            loss = model(**batch).loss
        else:
            with passing(batch):
                loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def _all(data: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for _ in range(EPOCHS):
        yield from data
