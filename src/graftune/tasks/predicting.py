"""A trained adapter at work: loaded from its directory, it answers and is measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from graftune.errors import DataError
from graftune.tasks import beside, dropping, metrics
from graftune.tasks.data import Example
from graftune.tasks.models import load_base
from graftune.tasks.task import Ready, Task, find_task
from graftune.tasks.workspace import ADAPTER, read_task

ADAPTER_NAME = "default"


@dataclass(frozen=True)
class Predictor:
    """A base with an adapter, ready to answer."""

    task: Task
    ready: Ready
    columns: dict[str, str]
    """The columns of the data that it was trained on."""

    @classmethod
    def load(
        cls, directory: str | Path, *, base_only: bool = False, drop: int | None = None
    ) -> Predictor:
        """Returns what a run's or an adapter's directory describes, on the GPU where there is one.

        Args:
            directory: The run's or the adapter's.
            base_only: Leave the adapter out.
            drop: Lowest blocks in which nothing acts; None for what it was trained for.

        Raises:
            FormatError: The directory is not a finished run's or an adapter's, or the adapter
                doesn't fit the base.
            SettingsError: The base isn't there, or has fewer blocks than are dropped.
        """
        directory = Path(directory)
        told = read_task(directory)
        adapter = directory / ADAPTER if (directory / ADAPTER).is_dir() else directory
        task = find_task(told["task"], told.get("task_options"))
        ready = _ready(told, task)
        if not base_only:
            from graftune.formats import load

            others: list[str] = told.get("beside", [])
            beside.attach(ready.model, beside.kept(directory, others) if others else {})
            name = ADAPTER_NAME if ADAPTER_NAME not in others else f"{ADAPTER_NAME}-run"
            loaded = load(ready.model, adapter, name)
            dropping.activate(loaded, told.get("drop", 0) if drop is None else drop)
        model: Any = ready.model
        model.to(_device())
        return cls(task, ready, told["columns"])

    def predict(
        self,
        rows: Sequence[str | Mapping[str, Any]],
        batch_size: int = 32,
        *,
        max_new_tokens: int = 128,
    ) -> list[dict[str, Any]]:
        """Returns an answer for each text or row, in their order.

        Raises:
            DataError: A row can't be asked.
        """
        examples = [self._question(row, f"row {n}") for n, row in enumerate(rows, start=1)]
        return answer(self.task, self.ready, examples, batch_size, max_new_tokens)

    def _question(self, row: str | Mapping[str, Any], where: str) -> Example:
        if isinstance(row, Mapping):
            usual = {role: row[name] for role, name in self.columns.items() if name in row}
            row = {**row, **usual}
        return self.task.question(row, where)


def _ready(told: Mapping[str, Any], task: Task) -> Ready:
    labels = told["labels"] if task.new_head else None
    base = load_base(told["base"], task.model_task, labels=labels, dtype=told["precision"])
    if told["chat_template"] is not None:
        base.tokenizer.chat_template = told["chat_template"]
    return Ready(base.model, base.tokenizer, told["labels"], told["max_length"])


def answer(
    task: Task,
    ready: Ready,
    examples: Sequence[Example],
    batch_size: int,
    max_new_tokens: int = 128,
) -> list[dict[str, Any]]:
    """Returns the model's answer to each example, the model being in eval mode for it.

    Raises:
        DataError: `batch_size` or `max_new_tokens` is below 1.
    """
    if batch_size < 1 or max_new_tokens < 1:
        raise DataError(
            f"batch_size is {batch_size}, max_new_tokens {max_new_tokens}; both must be 1 or more."
        )
    if not examples:
        return []
    training = ready.model.training
    ready.model.eval()
    try:
        return task.answer(examples, ready, batch_size=batch_size, max_new_tokens=max_new_tokens)
    finally:
        ready.model.train(training)


@dataclass(frozen=True)
class Measured:
    """How a model does on examples whose answers are known."""

    metrics: dict[str, float]
    confusion: list[list[int]]
    """Counts by true class (row) and answered class (column); [] without classes."""


def measure_answers(
    task: Task, labels: Sequence[str], examples: Sequence[Example], answers: Sequence[Any]
) -> Measured:
    """Returns the metrics of answered labels."""
    number = {label: index for index, label in enumerate(labels)}
    targets = np.array([number[example.stratum] for example in examples])
    said = np.array([number[one["label"]] for one in answers])
    counts = metrics.confusion(targets, said, len(labels))
    return Measured(task.score(said, targets), counts.tolist())


def measure_logits(
    task: Task, ready: Ready, features: Sequence[dict[str, Any]], batch_size: int
) -> Measured:
    """Returns the metrics of the model's logits on encoded examples."""
    import torch

    from graftune.tasks.batches import batches_of_like_length

    training = ready.model.training
    ready.model.eval()
    parts: list[Any] = []
    collate = task.collate(ready)
    for _, batch in batches_of_like_length(features, ready, batch_size, collate=collate):
        labels = batch["labels"]
        with torch.inference_mode():
            logits = task.forward(ready.model, batch)["logits"]
            parts.append(task.summarise(logits, labels).cpu().numpy())
    ready.model.train(training)
    return Measured(task.score(np.concatenate(parts), None), [])


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
