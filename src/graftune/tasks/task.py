"""What a task is: how rows become examples, examples tensors, and outputs answers and metrics.

A new task is one file with one class, registered by `@register_task`; nothing else changes.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

from graftune.errors import SettingsError, nearest
from graftune.tasks.data import Example
from graftune.tasks.settings import Columns
from graftune.tasks.tables import Table

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Ready:
    """A model with all that a task needs to compute with it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    labels: list[str]
    """Class names by number; [] for a task without classes."""
    max_length: int
    """Longest example in tokens."""


@dataclass
class Encoded:
    """Examples as token numbers."""

    features: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    """What the collator makes batches of: `input_ids`, `labels`, …"""
    lengths: list[int] = field(default_factory=list[int])
    """Tokens of each example before it was cut."""
    notes: list[str] = field(default_factory=list[str])
    """What a user should know about the cutting."""


class Task(Protocol):
    """The parts of a training run that differ from task to task."""

    name: ClassVar[str]
    summary: ClassVar[str]
    """One line for help texts."""
    model_task: ClassVar[str]
    """What `load_base` is asked for."""
    epochs: ClassVar[float]
    batch_size: ClassVar[int]
    max_length: ClassVar[int]
    """Defaults of the settings of these names."""
    metric: ClassVar[str]
    """What "best" means: the name of a metric, "loss" where less is better."""
    metrics: ClassVar[tuple[str, ...]]
    """The names of all metrics."""
    roles: ClassVar[tuple[str, ...]]
    """The `data.columns` settings that it knows."""

    def columns(self, table: Table, named: Columns) -> dict[str, str]:
        """Returns the column of each role. Raises DataError when one is missing."""
        ...

    def examples(self, table: Table, columns: Mapping[str, str]) -> list[Example]:
        """Returns a table's rows as examples. Raises DataError for a row that can't be used."""
        ...

    def question(self, row: str | Mapping[str, Any], where: str) -> Example:
        """Returns a text or a row without an answer as an example to predict on."""
        ...

    def labels(self, splits: Mapping[str, Sequence[Example]]) -> list[str]:
        """Returns the class names, [] without classes. Raises DataError if they can't be learnt."""
        ...

    def prepare(self, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """Makes a tokenizer fit for the task; returns what to tell the user."""
        ...

    def encode(self, examples: Sequence[Example], ready: Ready) -> Encoded:
        """Returns training examples as token numbers."""
        ...

    def summarise(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Returns the little of a batch's logits that the metrics need, on its device."""
        ...

    def score(self, summaries: Any, labels: Any) -> dict[str, float]:
        """Returns the metrics of the summaries `(examples, …)` of all batches."""
        ...

    def answer(
        self, examples: Sequence[Example], ready: Ready, *, batch_size: int, max_new_tokens: int
    ) -> list[dict[str, Any]]:
        """Returns the model's answer to each example, as plain values."""
        ...


T = TypeVar("T", bound=type)
_tasks: dict[str, Callable[[], Task]] = {}


def register_task(cls: T) -> T:
    """Registers a task class under its name. A class decorator.

    Raises:
        SettingsError: Another task has the name.
    """
    name = str(getattr(cls, "name"))  # noqa: B009  (a plain `type` has no such attribute)
    if name in _tasks and _tasks[name] is not cls:
        raise SettingsError(f'A task named "{name}" is registered already: {_tasks[name]!r}.')
    _tasks[name] = cls
    return cls


def tasks() -> dict[str, Callable[[], Task]]:
    """Returns the registered task classes by name."""
    for module in ("classification", "instruct"):  # they register themselves
        importlib.import_module(f"graftune.tasks.{module}")
    return dict(_tasks)


def find_task(name: str) -> Task:
    """Returns the task of a name.

    Raises:
        SettingsError: There is none, naming the nearest.
    """
    known = tasks()
    if name not in known:
        listed = ", ".join(known)
        raise SettingsError(f'No task is named "{name}"; there are {listed}.{nearest(name, known)}')
    return known[name]()


def cut_note(lengths: Sequence[int], max_length: int, what: str = "") -> list[str]:
    """Returns the sentence that says how many examples were longer than the limit, if any."""
    cut = sum(length > max_length for length in lengths)
    if not cut:
        return []
    return [
        f"{cut} of {len(lengths)} texts are longer than {max_length} tokens (the longest has "
        f"{max(lengths)}) and were cut{what}."
    ]
