"""Multi-label classification: a set of labels, of any size, for a text or a pair of texts.

columns   text (and text_pair), label: a list, or a text with a separator between labels
head      the model class's own with an output for each label, newly initialised, trained as well
batches   padded to the longest text in each; loss: binary cross-entropy, the mean over all labels
metrics   micro and macro F1, subset accuracy (the whole set is right)
answer    {"text", "labels": [...], "probabilities": {label: p}}
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, cast

import numpy as np
from pydantic import Field

from graftune.errors import DataError, SettingsError, nearest
from graftune.tasks import metrics
from graftune.tasks.classification import (
    LABELS,
    Classification,
    label_of,
    label_order,
    logits_of,
    text_columns,
    text_key,
    text_tokens,
    texts_in,
    texts_of,
)
from graftune.tasks.columns import find_column
from graftune.tasks.data import Example
from graftune.tasks.settings import Columns, TaskOptions
from graftune.tasks.tables import Table
from graftune.tasks.task import Encoded, Ready, cut_note, register_task

if TYPE_CHECKING:
    from torch import Tensor

    from graftune.tasks.measured import Measured

SETS = ("labels", "label", "categories", "tags", "topics", "emotions", "genres", *LABELS)


class MultilabelOptions(TaskOptions):
    """How sets of labels are read and answered."""

    separator: str = ","
    """What stands between labels where they are one text and no list."""
    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """A label is answered where its probability is above this."""


@register_task
class Multilabel(Classification):
    """Any number of labels for a text or a pair of texts."""

    name: ClassVar[str] = "multilabel"
    summary: ClassVar[str] = "any number of labels for a text or a pair of texts"
    model_task: ClassVar[str] = "multilabel"
    metric: ClassVar[str] = "micro_f1"
    metrics: ClassVar[tuple[str, ...]] = ("micro_f1", "macro_f1", "subset_accuracy")
    picks: ClassVar[bool] = False
    options_type: ClassVar[type[TaskOptions]] = MultilabelOptions

    def __init__(self, options: MultilabelOptions | None = None) -> None:
        self._options = options or MultilabelOptions()
        if not self._options.separator:
            raise SettingsError('task_options.separator is "", expected one character or more.')

    @property
    def options(self) -> MultilabelOptions:
        """See `Task.options`."""
        return self._options

    def columns(self, table: Table, named: Columns) -> dict[str, str]:
        """Returns the columns of text, text_pair (of pairs) and labels."""
        label = find_column(table, "label", named.label, SETS)
        return {**text_columns(table, named), "label": str(label)}

    def examples(self, table: Table, columns: Mapping[str, str]) -> list[Example]:
        """Returns each row's text(s) and sorted labels, which may be none.

        Raises:
            DataError: A text is empty or no text; labels are neither a list nor a text.
        """
        found: list[Example] = []
        for index, row in enumerate(table.rows):
            where = table.where(index)
            fields: dict[str, Any] = dict(texts_of(row, columns, where))
            key = text_key(fields)
            fields["labels"] = self._set(row.get(columns["label"]), columns["label"], where)
            found.append(Example(fields, key, "", where))
        return found

    def _set(self, value: Any, column: str, where: str) -> list[str]:
        """Returns the labels in a cell, each once, sorted."""
        if isinstance(value, str):
            text = value.strip()
            value = _listed(text) if text.startswith("[") else text.split(self._options.separator)
            value = [item for item in value if not isinstance(item, str) or item.strip()]
        elif value is None:
            value = []
        elif isinstance(value, int | float) and not isinstance(value, bool):
            value = [value]
        if not isinstance(value, list | tuple):
            raise DataError(
                f'{where}: the labels ("{column}") are {value!r:.80}, expected a list, or a text '
                f'with "{self._options.separator}" between them (task_options.separator).'
            )
        found = {label_of(item) for item in cast(Sequence[Any], value)}
        if "" in found:
            raise DataError(f'{where}: one of the labels ("{column}") is empty: {value!r:.80}.')
        return sorted(found, key=label_order)

    def labels(self, splits: Mapping[str, Sequence[Example]]) -> list[str]:
        """Returns the labels of the training data, numbers by size, names by alphabet.

        Raises:
            DataError: There are fewer than two; or another split has one that training never sees.
        """
        found = {label for example in splits["train"] for label in example.fields["labels"]}
        if len(found) < 2:
            raise DataError(
                f"The {len(splits['train'])} training rows have {len(found)} labels in all, "
                "expected two or more; for one label or none use the task classification."
            )
        for split in ("validation", "test"):
            for example in splits.get(split, ()):
                self._check(example, found, f"never occurs in the training data (it is in {split})")
        return sorted(found, key=label_order)

    def check_known(self, examples: Sequence[Example], labels: Sequence[str]) -> None:
        """See `Task.check_known`."""
        for example in examples:
            self._check(example, labels, "is not one that the run was trained on")

    def _check(self, example: Example, known: Any, what: str) -> None:
        for label in example.fields["labels"]:
            if label not in known:
                raise DataError(
                    f'{example.where}: the label "{label}" {what}.{nearest(label, known)}'
                )

    def remarks(self, examples: Sequence[Example]) -> list[str]:
        """Returns how many labels rows have, and which separator might be missed."""
        counts = Counter(len(example.fields["labels"]) for example in examples)
        total = sum(count * rows for count, rows in counts.items())
        notes = [
            f"{total / len(examples):.2g} labels a row, {max(counts)} at most; "
            f"{counts[0]} of {len(examples)} rows have none."
        ]
        if max(counts) <= 1:
            notes.append(
                "no row has two labels: set task_options.separator to what stands between them, "
                "or use the task classification."
            )
        return notes

    def encode(self, examples: Sequence[Example], ready: Ready) -> Encoded:
        """Returns each text as tokens, cut to the limit, with a 1 for each label that it has."""
        lengths, rows = text_tokens(examples, ready)
        for row, example in zip(rows, examples, strict=True):
            if "labels" in example.fields:
                row["labels"] = _flags(example.fields["labels"], ready.labels)
        return Encoded(rows, lengths, cut_note(lengths, ready.max_length))

    @property
    def has_own_forward(self) -> bool:
        """See `Task.has_own_forward`: the loss is the model's."""
        return False

    def forward(self, model: Any, batch: dict[str, Any]) -> Mapping[str, Any]:
        """See `Task.forward`."""
        return model(**batch)

    def summarise(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Returns whether each label is answered, `(batch, labels)`."""
        return logits.float().sigmoid() > self._options.threshold

    def score(self, summaries: Any, labels: Any) -> dict[str, float]:
        """Returns F1 and subset accuracy of answered sets against right ones, as 0 and 1."""
        said, right = np.asarray(summaries) > 0, np.asarray(labels) > 0
        return {
            "micro_f1": metrics.f1(metrics.flag_counts(said, right).sum(axis=0)),
            "macro_f1": float(np.mean([metrics.f1(c) for c in metrics.flag_counts(said, right)])),
            "subset_accuracy": float((said == right).all(axis=1).mean()),
        }

    def answer(
        self, examples: Sequence[Example], ready: Ready, *, batch_size: int, max_new_tokens: int
    ) -> list[dict[str, Any]]:
        """Returns each text with its labels, the likeliest first, and all probabilities."""
        chances = logits_of(examples, ready, batch_size).sigmoid().tolist()
        return [
            self._answer(example, row, ready.labels)
            for example, row in zip(examples, chances, strict=True)
        ]

    def _answer(
        self, example: Example, chances: Sequence[float], labels: Sequence[str]
    ) -> dict[str, Any]:
        found = dict(zip(labels, chances, strict=True))
        said = [label for label in labels if found[label] > self._options.threshold]
        said.sort(key=lambda label: -found[label])
        return {**texts_in(example), "labels": said, "probabilities": found}

    def measure(
        self,
        examples: Sequence[Example],
        answers: Sequence[Mapping[str, Any]],
        labels: Sequence[str],
    ) -> Measured:
        """See `Task.measure`."""
        from graftune.tasks.measured import Measured

        said = np.array([_flags(one["labels"], labels) for one in answers])
        right = np.array([_flags(example.fields["labels"], labels) for example in examples])
        counts = metrics.flag_counts(said > 0, right > 0)
        classes = [
            {"label": label, **metrics.flag_scores(row)}
            for label, row in zip(labels, counts, strict=True)
        ]
        return Measured(self.score(said, right), [], classes, _set_f1(said > 0, right > 0))

    def truth(self, example: Example) -> dict[str, Any]:
        """Returns the right labels."""
        return {"true": example.fields["labels"]}


def _listed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text.strip("[]").replace("'", "").replace('"', "").split(",")


def _set_f1(said: metrics.Flags, right: metrics.Flags) -> list[float]:
    """Returns F1 of each row's set of labels; 1 where it is empty and ought to be."""
    both, total = (said & right).sum(axis=1), said.sum(axis=1) + right.sum(axis=1)
    return [2 * float(b) / float(t) if t else 1.0 for b, t in zip(both, total, strict=True)]


def _flags(labels: Sequence[str], known: Sequence[str]) -> list[float]:
    """Returns 1 for each known label that is among `labels`, else 0."""
    return [float(label in labels) for label in known]
