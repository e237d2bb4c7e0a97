"""Regression: a number for a text or a pair of texts, such as how alike two sentences are.

columns   text (and text_pair), value
head      the model class's own with one output, newly initialised, trained with the adapter
batches   padded to the longest text in each; loss: mean squared error of the values as they are
metrics   Pearson's and Spearman's correlation, root mean squared error, mean absolute error
answer    {"text", "value"}
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from graftune.errors import DataError
from graftune.tasks import metrics
from graftune.tasks.classification import (
    Classification,
    logits_of,
    text_columns,
    text_key,
    text_tokens,
    texts_in,
    texts_of,
)
from graftune.tasks.columns import find_column
from graftune.tasks.data import Example
from graftune.tasks.settings import Columns
from graftune.tasks.tables import Table
from graftune.tasks.task import Encoded, Ready, cut_note, register_task

if TYPE_CHECKING:
    from torch import Tensor

    from graftune.tasks.measured import Measured

VALUES = ("value", "score", "similarity_score", "similarity", "label", "rating", "target", "stars")
_WIDE = 20.0
"""Standard deviations, or means, of the values beyond which a new head is slow to learn them."""


@register_task
class Regression(Classification):
    """A number for a text or a pair of texts."""

    name: ClassVar[str] = "regression"
    summary: ClassVar[str] = "a number for a text or a pair of texts"
    model_task: ClassVar[str] = "regression"
    metric: ClassVar[str] = "loss"
    metrics: ClassVar[tuple[str, ...]] = ("pearson", "spearman", "rmse", "mae")
    roles: ClassVar[tuple[str, ...]] = ("text", "text_pair", "value")
    picks: ClassVar[bool] = False
    answers_all: ClassVar[bool] = True

    def columns(self, table: Table, named: Columns) -> dict[str, str]:
        """Returns the columns of text, text_pair (of pairs) and value."""
        value = find_column(table, "value", named.value, VALUES)
        return {**text_columns(table, named), "value": str(value)}

    def examples(self, table: Table, columns: Mapping[str, str]) -> list[Example]:
        """Returns each row's text(s) and value.

        Raises:
            DataError: A text is empty or no text; a value is no finite number.
        """
        found: list[Example] = []
        for index, row in enumerate(table.rows):
            where = table.where(index)
            fields = texts_of(row, columns, where)
            value = _number(row.get(columns["value"]), columns["value"], where)
            found.append(Example({**fields, "value": value}, text_key(fields), "", where))
        return found

    def labels(self, splits: Mapping[str, Sequence[Example]]) -> list[str]:
        """Returns no labels.

        Raises:
            DataError: All training rows have the same value.
        """
        values = {example.fields["value"] for example in splits["train"]}
        if len(values) < 2:
            raise DataError(
                f"All {len(splits['train'])} training rows have the value {values.pop():g}: there "
                "is nothing to learn."
            )
        return []

    def remarks(self, examples: Sequence[Example]) -> list[str]:
        """Returns that values are large, where they are."""
        values = np.array([example.fields["value"] for example in examples])
        middle, spread = float(values.mean()), float(values.std())
        if max(abs(middle), spread) <= _WIDE:
            return []
        return [
            f"the values have a mean of {middle:.4g} and a standard deviation of {spread:.4g}; a "
            "new head begins near 0 and learns small ones sooner: divide them by some number."
        ]

    def encode(self, examples: Sequence[Example], ready: Ready) -> Encoded:
        """Returns each text as tokens, cut to the limit, with its value."""
        lengths, rows = text_tokens(examples, ready)
        for row, example in zip(rows, examples, strict=True):
            if "value" in example.fields:
                row["labels"] = example.fields["value"]
        return Encoded(rows, lengths, cut_note(lengths, ready.max_length))

    def summarise(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Returns the answered value of each row of logits `(batch, 1)`."""
        return logits.float().squeeze(-1)

    def score(self, summaries: Any, labels: Any) -> dict[str, float]:
        """Returns correlations and errors of answered values against right ones."""
        said, right = np.asarray(summaries, np.float64), np.asarray(labels, np.float64)
        return {
            "pearson": metrics.pearson(said, right),
            "spearman": metrics.spearman(said, right),
            "rmse": float(np.sqrt(np.square(said - right).mean())),
            "mae": float(np.abs(said - right).mean()),
        }

    def answer(
        self, examples: Sequence[Example], ready: Ready, *, batch_size: int, max_new_tokens: int
    ) -> list[dict[str, Any]]:
        """Returns each text with its value."""
        values = logits_of(examples, ready, batch_size)[:, 0].tolist()
        return [
            {**texts_in(example), "value": value}
            for example, value in zip(examples, values, strict=True)
        ]

    def measure(
        self,
        examples: Sequence[Example],
        answers: Sequence[Mapping[str, Any]],
        labels: Sequence[str],
    ) -> Measured:
        """See `Task.measure`."""
        from graftune.tasks.measured import Measured

        right = [example.fields["value"] for example in examples]
        said = [float(one["value"]) for one in answers]
        rows = [-abs(one - other) for one, other in zip(said, right, strict=True)]
        return Measured(self.score(said, right), [], rows=rows)

    def truth(self, example: Example) -> dict[str, Any]:
        """Returns the right value."""
        return {"true": example.fields["value"]}


def _number(value: Any, column: str, where: str) -> float:
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found):
        raise DataError(f'{where}: the value ("{column}") is {value!r:.80}, expected a number.')
    return found
