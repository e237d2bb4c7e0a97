"""The linear probe: how far the frozen base's sentence vectors go without any training of it.

vector   the mean of the last hidden states over a text's own tokens
head     softmax regression, W x + b, with an L2 penalty chosen on the validation data
solver   L-BFGS, which finds the one optimum
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from graftune.anatomy.packed import elements, stored_bytes
from graftune.errors import SettingsError
from graftune.tasks import workspace
from graftune.tasks.batches import batches_of_like_length
from graftune.tasks.data import Loaded
from graftune.tasks.linear_head import best_head
from graftune.tasks.metrics import confusion
from graftune.tasks.resolving import length_limit, precision
from graftune.tasks.result import RunResult, Watcher
from graftune.tasks.settings import RunSettings
from graftune.tasks.task import Ready, Task, find_task
from graftune.tasks.workshop import ALONE, BODY, Source

_BATCH = 32


def run_probe(
    settings: RunSettings, watcher: Watcher, overwrite: bool, source: Source = ALONE
) -> RunResult:
    """Returns the result of a linear probe of the settings' base and data, which it writes."""
    began = time.monotonic()
    task = find_task(settings.task)
    if task.name != "classification":
        raise SettingsError(f"A linear probe needs labels; the task {task.name} has none.")
    settings = settings.replaced(name=settings.name or f"{settings.task}-probe")
    settings = settings.replaced(out=str(settings.run_dir))
    data = source.data(settings, task)
    labels = task.labels(data.splits)
    with workspace.claimed(settings.run_dir, overwrite=overwrite):
        workspace.write_text(settings.run_dir / workspace.SETTINGS, settings.to_yaml())
        result = _probed(settings, task, data, labels, watcher, began, source)
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
    source: Source,
) -> RunResult:
    from graftune.training.memory import peak_memory_bytes, reset_peak_memory

    reset_peak_memory()
    base = source.frozen(settings, BODY, precision(settings), watcher.on_note)
    limit = length_limit(settings, task, base.model, base.tokenizer)
    ready = Ready(base.model, base.tokenizer, labels, limit)
    loaded = time.monotonic()
    seen = {split: found for split, found in data.splits.items() if split != "test"}
    vectors = {split: sentence_vectors(task, ready, found) for split, found in seen.items()}
    targets = _targets(data, labels)
    head = best_head(vectors, targets, len(labels), by="accuracy")
    costs = {"start_seconds": time.monotonic() - loaded}
    for split in data.splits.keys() - seen.keys():
        vectors[split] = sentence_vectors(task, ready, data.splits[split])
    said = {split: head.logits(found).argmax(dim=-1).numpy() for split, found in vectors.items()}
    tables = {split: confusion(targets[split].numpy(), said[split], len(labels)) for split in said}
    if "test" in said:
        _write_answers(data.splits["test"], labels, said["test"].tolist(), settings)
    trained = head.weight.numel() + head.bias.numel()
    size = sum(elements(p) for p in base.model.parameters())
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
        base_bytes=stored_bytes(base.model),
        seconds=time.monotonic() - began,
        peak_memory_bytes=peak_memory_bytes(),
        adapter_path="",
        run_dir=str(settings.run_dir),
        data=data.report.to_dict(),
        notes=list(data.report.notes),
        costs=costs,
    )


def _write_answers(
    examples: Sequence[Any], labels: Sequence[str], said: Sequence[int], settings: RunSettings
) -> None:
    rows = [
        {**example.fields, "label": labels[answer], "true": example.stratum}
        for example, answer in zip(examples, said, strict=True)
    ]
    workspace.write_lines(settings.run_dir / workspace.PREDICTIONS, rows)
    workspace.write_scores(settings.run_dir, (float(one["label"] == one["true"]) for one in rows))


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


def _targets(data: Loaded, labels: Sequence[str]) -> dict[str, Tensor]:
    number = {label: index for index, label in enumerate(labels)}
    return {
        split: torch.tensor([number[example.stratum] for example in examples])
        for split, examples in data.splits.items()
    }
