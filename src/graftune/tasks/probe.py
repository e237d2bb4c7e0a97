"""The linear probe: how far the frozen base's sentence vectors go without any training of it.

vector   the mean of the last hidden states over a text's own tokens
head     softmax regression, W x + b, with an L2 penalty chosen on the validation data
solver   L-BFGS, which finds the one optimum
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graftune.errors import SettingsError
from graftune.tasks import workspace
from graftune.tasks.batches import batches_of_like_length
from graftune.tasks.data import Loaded, load
from graftune.tasks.metrics import confusion
from graftune.tasks.models import load_base
from graftune.tasks.resolving import length_limit, precision
from graftune.tasks.result import RunResult, Watcher
from graftune.tasks.settings import RunSettings
from graftune.tasks.task import Ready, Task, find_task

PENALTIES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
"""Weights of ‖W‖² / 2 beside the mean loss, strongest first."""
_STEPS = 200
_BATCH = 32


@dataclass(frozen=True)
class Head:
    """A linear classifier: weight (classes, features), bias (classes)."""

    weight: Tensor
    bias: Tensor

    def logits(self, vectors: Tensor) -> Tensor:
        """Returns (rows, classes) of vectors (rows, features)."""
        return vectors @ self.weight.T + self.bias


def run_probe(settings: RunSettings, watcher: Watcher, overwrite: bool) -> RunResult:
    """Returns the result of a linear probe of the settings' base and data, which it writes."""
    began = time.monotonic()
    task = find_task(settings.task)
    if task.name != "classification":
        raise SettingsError(f"A linear probe needs labels; the task {task.name} has none.")
    settings = settings.replaced(name=settings.name or f"{settings.task}-probe")
    settings = settings.replaced(out=str(settings.run_dir))
    data = load(settings.data, task)
    labels = task.labels(data.splits)
    with workspace.claimed(settings.run_dir, overwrite=overwrite):
        workspace.write_text(settings.run_dir / workspace.SETTINGS, settings.to_yaml())
        result = _probed(settings, task, data, labels, watcher, began)
        workspace.write_text(settings.run_dir / workspace.RESULT, result.to_json())
    watcher.on_end(result)
    return result


def _probed(
    settings: RunSettings,
    task: Task,
    data: Loaded,
    labels: list[str],
    watcher: Watcher,
    began: float,
) -> RunResult:
    from graftune.training.memory import peak_memory_bytes, reset_peak_memory

    reset_peak_memory()
    base = load_base(settings.base, "feature", dtype=precision(settings), note=watcher.on_note)
    limit = length_limit(settings, task, base.model, base.tokenizer)
    ready = Ready(base.model, base.tokenizer, labels, limit)
    vectors = {split: sentence_vectors(task, ready, found) for split, found in data.splits.items()}
    targets = _targets(data, labels)
    head = best_head(vectors, targets, len(labels))
    said = {split: head.logits(found).argmax(dim=-1).numpy() for split, found in vectors.items()}
    tables = {split: confusion(targets[split].numpy(), said[split], len(labels)) for split in said}
    trained = head.weight.numel() + head.bias.numel()
    size = sum(p.numel() for p in base.model.parameters())
    return RunResult(
        name=settings.run_name,
        kind="probe",
        settings=settings.to_dict(),
        versions=workspace.versions(),
        history=[],
        metrics={
            split: task.score(said[split], targets[split].numpy())
            for split in ("validation", "test")
            if split in said
        },
        confusion=tables["test"].tolist() if "test" in tables else [],
        labels=labels,
        parameters={"trainable": trained, "changed": 0, "base": size, "share": trained / size},
        adapter_bytes=0,
        base_bytes=sum(p.numel() * p.element_size() for p in base.model.parameters()),
        seconds=time.monotonic() - began,
        peak_memory_bytes=peak_memory_bytes(),
        adapter_path="",
        run_dir=str(settings.run_dir),
        data=data.report.to_dict(),
        notes=list(data.report.notes),
    )


def sentence_vectors(task: Task, ready: Ready, examples: Sequence[Any]) -> Tensor:
    """Returns each text's mean last hidden state over its own tokens, (rows, hidden), float32."""
    rows = task.encode(examples, ready).features
    inputs = [{key: row[key] for key in row if key != "labels"} for row in rows]
    found: list[Tensor | None] = [None] * len(rows)
    for indices, batch in batches_of_like_length(inputs, ready, _BATCH):
        with torch.inference_mode():
            states = ready.model(**batch).last_hidden_state.float()
        mask = batch["attention_mask"].unsqueeze(-1).to(states.dtype)
        means = (states * mask).sum(dim=1) / mask.sum(dim=1)  # (B, H)
        for index, mean in zip(indices, means.cpu(), strict=True):
            found[index] = mean
    return torch.stack([vector for vector in found if vector is not None])


def best_head(vectors: Mapping[str, Tensor], targets: Mapping[str, Tensor], classes: int) -> Head:
    """Returns the head whose penalty does best on the validation data (1e-3 without any)."""
    train, answers = vectors["train"], targets["train"]
    if "validation" not in vectors:
        return fit_head(train, answers, classes, 1e-3)
    heads = [fit_head(train, answers, classes, penalty) for penalty in PENALTIES]
    right = [
        int((head.logits(vectors["validation"]).argmax(-1) == targets["validation"]).sum())
        for head in heads
    ]
    return heads[int(np.argmax(right))]


def fit_head(vectors: Tensor, targets: Tensor, classes: int, penalty: float) -> Head:
    """Returns the softmax regression that minimises mean cross-entropy + penalty · ‖W‖² / 2."""
    weight = torch.zeros(classes, vectors.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight, bias], max_iter=_STEPS, line_search_fn="strong_wolfe", tolerance_grad=1e-6
    )

    def loss() -> Tensor:
        solver.zero_grad()
        logits = vectors @ weight.T + bias
        value = torch.nn.functional.cross_entropy(logits, targets)
        value = value + penalty / 2 * weight.square().sum()
        value.backward()
        return value

    solver.step(loss)  # pyright: ignore[reportArgumentType]  (torch types the closure as float)
    return Head(weight.detach(), bias.detach())


def _targets(data: Loaded, labels: Sequence[str]) -> dict[str, Tensor]:
    number = {label: index for index, label in enumerate(labels)}
    return {
        split: torch.tensor([number[example.stratum] for example in examples])
        for split, examples in data.splits.items()
    }
