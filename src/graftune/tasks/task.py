"""What a task is: how rows become examples, examples tensors, and outputs answers and metrics.

A new task is one file with one class, registered by `@register_task`; nothing else changes.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

from graftune.errors import DataError, SettingsError, nearest
from graftune.tasks.data import Example
from graftune.tasks.models import LABELLED, NEW_HEADS
from graftune.tasks.settings import Columns, TaskOptions
from graftune.tasks.tables import Table

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from graftune.tasks.measured import Measured, Score


@dataclass(frozen=True)
class Ready:
    """A model with all that a task needs to compute with it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    """Of a task that reads images the base's image processor."""
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
    cut: int | None = None
    """Examples that were cut; None: those longer than the limit."""


class Task(Protocol):
    """The parts of a training run that differ from task to task.

    A task is a subclass; what has a body here need not be written again.
    """

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
    picks: ClassVar[bool] = False
    """Whether an answer is one of given labels, so that all answers are measured."""
    answers_all: ClassVar[bool] = False
    """Whether it is measured by its answers to all rows, labels or none."""
    reads_images: ClassVar[bool] = False
    """Whether its rows are images, so that an image processor stands for the tokenizer."""
    packs: ClassVar[bool] = False
    """Whether its training rows can hold several examples."""
    options_type: ClassVar[type[TaskOptions]] = TaskOptions
    """Its own settings. A task that has some takes them when it is made."""

    @property
    def options(self) -> TaskOptions:
        """Its own settings, every default filled in."""
        return TaskOptions()

    @property
    def new_head(self) -> bool:
        """Whether a head for its labels is added to the base, which alone can't answer then."""
        return self.model_task in NEW_HEADS

    @property
    def starts_head(self) -> bool:
        """Whether a new head can start where a linear probe of texts or of their words ends."""
        return self.model_task in LABELLED

    @property
    def has_own_forward(self) -> bool:
        """Whether `forward` is the task's, so that the loss is a mean over a batch's examples."""
        return type(self).forward is not Task.forward

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

    def collate(self, ready: Ready) -> Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]:
        """Returns what makes a batch of encoded examples."""
        from graftune.tasks.batches import collator

        return collator(ready)

    def forward(self, model: Any, batch: dict[str, Any]) -> Mapping[str, Any]:
        """Returns a batch's `logits`, as `summarise` takes them, and with labels its `loss`."""
        return model(**batch)

    def inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Returns a batch as the model's own forward takes it, for methods that look at data."""
        return batch

    def summarise(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Returns the little of a batch's logits that the metrics need, on its device."""
        ...

    def score(self, summaries: Any, labels: Any) -> dict[str, float]:
        """Returns the metrics of the summaries `(examples, …)` of all batches."""
        ...

    def row_scores(self, summaries: Any) -> list[float]:
        """Returns how well each row was answered by its summary; [] where that isn't known."""
        return []

    def scorer(self, examples: Sequence[Example], encoded: Encoded, ready: Ready) -> Score:
        """Returns what makes metrics of all batches' summaries and labels, in the rows' order.

        `score` by itself, unless it needs the examples that the tensors were made of.
        """
        return self.score

    def answer(
        self, examples: Sequence[Example], ready: Ready, *, batch_size: int, max_new_tokens: int
    ) -> list[dict[str, Any]]:
        """Returns the model's answer to each example, as plain values."""
        ...

    def measure(
        self,
        examples: Sequence[Example],
        answers: Sequence[Mapping[str, Any]],
        labels: Sequence[str],
    ) -> Measured:
        """Returns the metrics of answers to examples whose right answers are known."""
        from graftune.tasks.measured import measure_labels

        return measure_labels(self.score, labels, examples, answers)

    def truth(self, example: Example) -> dict[str, Any]:
        """Returns what is written beside an example's answer, to compare it with."""
        return {"true": example.stratum} if example.stratum else example.fields

    def remarks(self, examples: Sequence[Example]) -> list[str]:
        """Returns what a user should know about a split's rows, a sentence each."""
        return []

    def check_known(self, examples: Sequence[Example], labels: Sequence[str]) -> None:
        """Checks that rows have only labels that a run was trained on.

        Raises:
            DataError: One has another.
        """
        for example in examples:
            if labels and example.stratum not in labels:
                raise DataError(
                    f'{example.where}: the label "{example.stratum}" is not one that the run was '
                    f"trained on.{nearest(example.stratum, labels)}"
                )


T = TypeVar("T", bound="type[Task]")
_tasks: dict[str, type[Task]] = {}


def register_task(cls: T) -> T:
    """Registers a task class under its name. A class decorator.

    Raises:
        SettingsError: Another task has the name.
    """
    if _tasks.get(cls.name, cls) is not cls:
        raise SettingsError(f'A task named "{cls.name}" is registered already: {_tasks[cls.name]}.')
    _tasks[cls.name] = cls
    return cls


def tasks() -> dict[str, type[Task]]:
    """Returns the registered task classes by name."""
    for module in (
        "classification",
        "instruct",
        "choices",
        "multitask",
        "labelling",
        "spans",
        "regression",
        "multilabel",
        "multiple_choice",
        "embedding",
        "seq2seq",
        "lm",
        "images",
    ):  # they register themselves
        importlib.import_module(f"graftune.tasks.{module}")
    return dict(_tasks)


def find_task(name: str, options: Mapping[str, Any] | None = None) -> Task:
    """Returns the task of a name, with its own settings.

    Raises:
        SettingsError: There is none, naming the nearest; or the task has no such settings.
    """
    known = tasks()
    if name not in known:
        listed = ", ".join(known)
        raise SettingsError(f'No task is named "{name}"; there are {listed}.{nearest(name, known)}')
    made: Any = known[name]
    chosen = made.options_type.of(name, options or {})
    return made(chosen) if made.options_type is not TaskOptions else made()


def cut_note(lengths: Sequence[int], max_length: int, what: str = "") -> list[str]:
    """Returns the sentence that says how many examples were longer than the limit, if any."""
    cut = sum(length > max_length for length in lengths)
    if not cut:
        return []
    return [
        f"{cut} of {len(lengths)} texts are longer than {max_length} tokens (the longest has "
        f"{max(lengths)}) and were cut{what}."
    ]
