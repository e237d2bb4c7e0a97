"""A trained adapter at work: loaded from its directory, it answers and is measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from graftune.errors import DataError, SettingsError
from graftune.tasks import beside, dropping
from graftune.tasks.data import Example
from graftune.tasks.measured import Measured, Score
from graftune.tasks.models import load_base
from graftune.tasks.quantising import Quantising
from graftune.tasks.task import Ready, Task, find_task
from graftune.tasks.workspace import ADAPTER, PROMPT, read_task

if TYPE_CHECKING:
    from graftune.tasks.chat_prompt import ChatPrompt
    from graftune.tasks.ranking import RankedPrompt

ADAPTER_NAME = "default"


@dataclass(frozen=True)
class Predictor:
    """A base with an adapter, ready to answer."""

    task: Task
    ready: Ready
    columns: dict[str, str]
    """The columns of the data that it was trained on."""
    prompt: RankedPrompt | ChatPrompt | None = None
    """What answers where nothing was trained."""

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
        adapter = adapter_folder(directory)
        task = find_task(told["task"], told.get("task_options"))
        if (adapter / PROMPT).is_file():
            return _prompted(adapter, told, task, base_only, drop)
        ready = _ready(told, task)
        if not base_only:
            from graftune.formats import load

            others: list[str] = told.get("beside", [])
            beside.attach(ready.model, beside.kept(directory, others) if others else {})
            name = ADAPTER_NAME if ADAPTER_NAME not in others else f"{ADAPTER_NAME}-run"
            loaded = load(ready.model, adapter, name)
            dropping.activate(loaded, told.get("drop", 0) if drop is None else drop)
        return cls(task, _placed(ready), told["columns"])

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
        examples = [self.question(row, f"row {n}") for n, row in enumerate(rows, start=1)]
        if self.prompt is not None:
            check_sizes(batch_size, max_new_tokens)
            size, room = batch_size, max_new_tokens
            return self.prompt.answers(examples, batch_size=size, max_new_tokens=room)
        return answer(self.task, self.ready, examples, batch_size, max_new_tokens)

    def measure(self, examples: Sequence[Example], batch_size: int) -> Measured:
        """Returns the metrics on examples whose answers are known."""
        task, ready = self.task, self.ready
        if self.prompt is not None:
            from graftune.tasks.prompting import measure

            check_sizes(batch_size)
            return measure(self.prompt, task, ready, examples, batch_size)
        if ready.labels or task.answers_all:
            found = answer(task, ready, examples, batch_size)
            return task.measure(examples, found, ready.labels)
        encoded = task.encode(examples, ready)
        score = task.scorer(examples, encoded, ready)
        return measure_logits(task, ready, encoded.features, batch_size, score)

    def question(self, row: str | Mapping[str, Any], where: str) -> Example:
        """Returns a text or a row as what the task is asked."""
        if isinstance(row, Mapping):
            usual = {role: row[name] for role, name in self.columns.items() if name in row}
            row = {**row, **usual}
        return self.task.question(row, where)


def needs_adapter(directory: Path) -> bool:
    """Whether what a run's or an adapter's directory describes can't answer without the adapter.

    Raises:
        FormatError: The directory is not a finished run's or an adapter's.
    """
    told = read_task(directory)
    return find_task(told["task"]).new_head and not (adapter_folder(directory) / PROMPT).is_file()


def _prompted(
    folder: Path, told: Mapping[str, Any], task: Task, base_only: bool, drop: int | None
) -> Predictor:
    """Returns what a run of in-context learning describes; `base_only`: without demonstrations."""
    from graftune.tasks import prompting
    from graftune.tasks.in_context import Demonstrations

    if drop is not None:
        raise SettingsError(f'"{folder}" holds prompts, no adapter: there is nothing to drop.')
    settings, shown = prompting.read(folder)
    if base_only:
        settings, shown = settings.model_copy(update={"shots": 0}), Demonstrations([])
    base, template = prompting.base_of(
        told["base"],
        task,
        settings,
        told["columns"],
        lambda kind: load_base(
            told["base"], kind, dtype=told["precision"], quantize=Quantising.told(told)
        ),
    )
    if told["chat_template"] is not None:
        base.tokenizer.chat_template = told["chat_template"]
    ready = _placed(Ready(base.model, base.tokenizer, told["labels"], told["max_length"]))
    prompt = prompting.prompt_of(settings, template, ready, shown)
    return Predictor(task, ready, told["columns"], prompt)


def adapter_folder(directory: Path) -> Path:
    """Returns the adapter's folder of a run's directory, or that directory itself."""
    return directory / ADAPTER if (directory / ADAPTER).is_dir() else directory


def _placed(ready: Ready) -> Ready:
    """Moves the model to the GPU where there is one."""
    model: Any = ready.model
    if not getattr(model, "is_quantized", False):  # else it was loaded there
        model.to(_device())
    return ready


def _ready(told: Mapping[str, Any], task: Task) -> Ready:
    labels = (told["labels"] or None) if task.new_head else None
    base = load_base(
        told["base"],
        task.model_task,
        labels=labels,
        dtype=told["precision"],
        quantize=Quantising.told(told),
    )
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
    check_sizes(batch_size, max_new_tokens)
    if not examples:
        return []
    training = ready.model.training
    ready.model.eval()
    try:
        return task.answer(examples, ready, batch_size=batch_size, max_new_tokens=max_new_tokens)
    finally:
        ready.model.train(training)


def check_sizes(batch_size: int, max_new_tokens: int = 1) -> None:
    """Raises DataError where a size is below 1."""
    if batch_size < 1 or max_new_tokens < 1:
        raise DataError(
            f"batch_size is {batch_size}, max_new_tokens {max_new_tokens}; both must be 1 or more."
        )


def measure_logits(
    task: Task,
    ready: Ready,
    features: Sequence[dict[str, Any]],
    batch_size: int,
    score: Score | None = None,
) -> Measured:
    """Returns the metrics of the logits of encoded examples, by the task's score or another."""
    import torch

    from graftune.tasks.batches import batches_of_like_length

    training = ready.model.training
    ready.model.eval()
    parts: list[Any] = []
    order: list[int] = []
    collate = task.collate(ready)
    for indices, batch in batches_of_like_length(features, ready, batch_size, collate=collate):
        labels = batch["labels"]
        with torch.inference_mode():
            logits = task.forward(ready.model, batch)["logits"]
            parts.append(task.summarise(logits, labels).cpu().numpy())
        order.extend(indices)
    ready.model.train(training)
    summaries = np.concatenate(parts)
    rows = task.row_scores(summaries[np.argsort(order)])
    return Measured((score or task.score)(summaries, None), [], rows=rows)


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
