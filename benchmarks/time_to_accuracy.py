"""How soon a side network on a kept trunk, top layers and heads are as good as HF PEFT's LoRA.

python -m benchmarks.time_to_accuracy TRAIN.jsonl TEST.jsonl [EPOCHS [NAME]]

Rows hold "text" and "label". Every side trains MiniLM and a new head on the same batches; time is
the process's own on one thread, evaluations left out. Of every side three learning rates are
tried, and LoRA's best is the mark for the others; side networks also train for three times the
epochs, since those are cheap. NAME leaves sides out whose name doesn't hold it.
"""

from __future__ import annotations

import contextlib
import copy
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

import graftune as gt
from benchmarks.models import RANK

BATCH, TOKENS, TESTED = 16, 64, 1000
NEAR = 0.01
"""Accuracy that counts as the mark's, below it."""


class Curve(NamedTuple):
    """Seconds of training and accuracy after each epoch."""

    name: str
    points: list[tuple[float, float]]

    @property
    def best(self) -> float:
        """Highest accuracy of an epoch."""
        return max(accuracy for _, accuracy in self.points)

    def reaches(self, mark: float) -> float | None:
        """Returns the seconds until the first epoch with that accuracy."""
        return next((seconds for seconds, accuracy in self.points if accuracy >= mark), None)


def sides() -> Iterator[tuple[str, Any, float, int]]:
    """Yields name, method (None for HF PEFT's LoRA), learning rate, and what multiplies epochs."""
    for lr in (1e-3, 3e-3, 1e-2):
        yield f"LoRA of HF PEFT, lr {lr:g}", None, lr, 1
        yield f"LoRA in the last 2 of 6, lr {lr:g}", gt.LoRA(r=RANK, layers=(4, 5)), lr, 1
        for ending in ("add", "replace"):
            name = f"Ladder Side-Tuning, {ending}, lr {lr:g}"
            yield name, gt.LadderSideTuning(ending=ending), lr, 1
    for reduction in (8, 4):
        for lr in (1e-3, 3e-3):
            name = f"Ladder Side-Tuning, replace, 1/{reduction}, 3 × epochs, lr {lr:g}"
            yield name, gt.LadderSideTuning(reduction=reduction), lr, 3


def curve(name: str, method: Any, lr: float, base: Any, data: Data, epochs: int) -> Curve:
    """Trains one side and returns what it reached when."""
    model, cache = _attached(copy.deepcopy(base), method), contextlib.nullcontext
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    steps = epochs * len(data.train)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda at: 1 - at / steps)
    points, seconds = list[tuple[float, float]](), 0.0
    with tempfile.TemporaryDirectory() as folder:
        began = time.process_time()
        if method is not None:
            cache = gt.TrunkCache(model, folder, still=True).passing
        seconds += time.process_time() - began
        for epoch in range(epochs):
            order = torch.randperm(
                len(data.train), generator=torch.Generator().manual_seed(epoch)
            ).tolist()
            model.train()
            began = time.process_time()
            for at in order:
                with cache(data.train[at]):
                    loss = model(**data.train[at]).loss
                loss.backward()
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            seconds += time.process_time() - began
            points.append((seconds, _accuracy(model.eval(), data.test)))
    return Curve(name, points)


class Data(NamedTuple):
    """Batches."""

    train: list[dict[str, torch.Tensor]]
    test: list[dict[str, torch.Tensor]]
    labels: list[str]


def read(train: str, test: str) -> Data:
    """Returns batches of two files, the training rows shuffled once."""
    from graftune.tasks.models import load_base

    tokenizer: Any = load_base("demo:minilm", "feature").tokenizer
    rows = [json.loads(line) for line in Path(train).read_text().splitlines()]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [rows[at] for at in order]
    tests = [json.loads(line) for line in Path(test).read_text().splitlines()]
    some = torch.randperm(len(tests), generator=torch.Generator().manual_seed(0))[:TESTED].tolist()
    tests = [tests[at] for at in some]
    labels = sorted({str(row["label"]) for row in rows})

    def batches(rows: list[Any]) -> list[dict[str, torch.Tensor]]:
        found: list[dict[str, torch.Tensor]] = []
        for start in range(0, len(rows), BATCH):
            part = rows[start : start + BATCH]
            made = tokenizer(
                [row["text"] for row in part],
                padding=True,
                truncation=True,
                max_length=TOKENS,
                return_tensors="pt",
            )
            told = torch.tensor([labels.index(str(row["label"])) for row in part])
            found.append({**made, "labels": told})
        return found

    return Data(batches(rows), batches(tests), labels)


def _attached(model: Any, method: Any) -> Any:
    if method is not None:
        gt.attach(model, method, seed=0)
        return model
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    settings = LoraConfig(task_type="SEQ_CLS", r=RANK, target_modules=["query", "value"])
    return get_peft_model(model, settings)


@torch.no_grad()
def _accuracy(model: Any, batches: list[dict[str, torch.Tensor]]) -> float:
    right = sum(int((model(**b).logits.argmax(-1) == b["labels"]).sum()) for b in batches)
    return right / sum(len(b["labels"]) for b in batches)


def main(train: str, test: str, epochs: int = 10, only: str = "") -> None:
    """Prints a line for each side, and when it reached what LoRA reached."""
    from graftune.tasks.models import load_base

    torch.set_num_threads(1)
    data = read(train, test)
    torch.manual_seed(0)
    base = load_base("demo:minilm", "classification", labels=data.labels).model
    curves: list[Curve] = []
    for name, method, lr, times in sides():
        if only not in name:
            continue
        curves.append(curve(name, method, lr, base, data, times * epochs))
        print(name, [f"{s:.0f} s {a:.3f}" for s, a in curves[-1].points], flush=True)
    mark = max((one.best for one in curves if "PEFT" in one.name), default=1.0) - NEAR
    print(f"\n| what trains | best accuracy | CPU s | to {mark:.3f} |")
    print("|---|---:|---:|---:|")
    for one in curves:
        reached = one.reaches(mark)
        said = "never" if reached is None else f"{reached:.0f} s"
        print(f"| {one.name} | {one.best:.3f} | {one.points[-1][0]:.0f} | {said} |")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:4]), *sys.argv[4:])
