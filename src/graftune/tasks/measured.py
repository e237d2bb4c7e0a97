"""How a model does on examples whose answers are known."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from graftune.tasks import metrics
from graftune.tasks.data import Example

LOWER_IS_BETTER = frozenset({"loss", "perplexity", "bits_per_byte", "rmse", "mae"})
"""The metrics of which less is better."""

Score = Callable[[Any, Any], dict[str, float]]
"""Metrics of what was answered and what is right."""


@dataclass(frozen=True)
class Measured:
    """Metrics and what they are made of."""

    metrics: dict[str, float]
    confusion: list[list[int]]
    """Counts by true class (row) and answered class (column); [] without classes."""
    classes: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    """`{label, precision, recall, f1, support}` of each kind of answer, where the confusion
    doesn't say it."""
    rows: list[float] = field(default_factory=list[float])
    """How well each row was answered, more is better, so that runs can be compared row by row; []
    where that isn't known."""


def measure_labels(
    score: Score,
    labels: Sequence[str],
    examples: Sequence[Example],
    answers: Sequence[Mapping[str, Any]],
) -> Measured:
    """Returns the metrics of answered labels, or of rows' own choices, which have no classes."""
    if not labels:
        rights = [one.fields["choices"].index(one.fields["answer"]) for one in examples]
        chosen = [
            example.fields["choices"].index(one["label"])
            for example, one in zip(examples, answers, strict=True)
        ]
        said, targets = np.array(chosen), np.array(rights)
        return Measured(score(said, targets), [], rows=_right(said, targets))
    number = {label: index for index, label in enumerate(labels)}
    targets = np.array([number[example.stratum] for example in examples])
    said = np.array([number[one["label"]] for one in answers])
    counts = metrics.confusion(targets, said, len(labels))
    return Measured(score(said, targets), counts.tolist(), rows=_right(said, targets))


def _right(said: metrics.Integers, targets: metrics.Integers) -> list[float]:
    return [float(right) for right in said == targets]
