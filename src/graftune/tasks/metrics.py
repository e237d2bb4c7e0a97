"""Metrics of the tasks, in plain numpy. Classes are integer numbers.

Source: macro F1 and MCC as scikit-learn defines them (a class that occurs in neither is left out;
a score whose denominator is 0 counts as 0), checked against it in the tests.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.integer[Any]]
Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]


def confusion(targets: Integers, predictions: Integers, classes: int) -> NDArray[np.int64]:
    """Returns counts `(classes, classes)`: rows are true classes, columns predicted ones."""
    flat = targets.astype(np.int64) * classes + predictions.astype(np.int64)
    return np.bincount(flat, minlength=classes * classes).reshape(classes, classes)


def accuracy(counts: NDArray[np.int64]) -> float:
    """Returns the share of right predictions of a confusion, 0..1."""
    return _ratio(float(np.trace(counts)), float(counts.sum()))


def class_scores(counts: NDArray[np.int64]) -> list[dict[str, float]]:
    """Returns `{precision, recall, f1, support}` of each class of a confusion."""
    right, answered, true = np.diag(counts), counts.sum(axis=0), counts.sum(axis=1)
    return [
        {
            "precision": _ratio(float(r), float(a)),
            "recall": _ratio(float(r), float(t)),
            "f1": _ratio(2.0 * float(r), float(a + t)),
            "support": float(t),
        }
        for r, a, t in zip(right, answered, true, strict=True)
    ]


def macro_f1(counts: NDArray[np.int64]) -> float:
    """Returns the mean F1 over the classes that occur in targets or predictions, 0..1."""
    occurs = (counts.sum(axis=0) + counts.sum(axis=1)) > 0
    scores = [
        score["f1"] for score, there in zip(class_scores(counts), occurs, strict=True) if there
    ]
    return _ratio(float(sum(scores)), float(len(scores)))


def matthews(counts: NDArray[np.int64]) -> float:
    """Returns Matthews' correlation coefficient of a confusion, −1..1 (multi-class form)."""
    table = counts.astype(np.float64)
    true, answered, total = table.sum(axis=1), table.sum(axis=0), table.sum()
    covariance = np.trace(table) * total - true @ answered
    spread = (total**2 - true @ true) * (total**2 - answered @ answered)
    return _ratio(float(covariance), math.sqrt(float(spread)))


def flag_counts(said: Flags, right: Flags) -> NDArray[np.int64]:
    """Returns how often each label was answered rightly, answered, and true, `(labels, 3)`.

    The flags are `(rows, labels)`.
    """
    return np.stack([(said & right).sum(axis=0), said.sum(axis=0), right.sum(axis=0)], axis=1)


def flag_scores(counts: NDArray[np.int64]) -> dict[str, float]:
    """Returns `{precision, recall, f1, support}` of one row of `flag_counts`."""
    right, answered, true = (float(count) for count in counts)
    return {
        "precision": _ratio(right, answered),
        "recall": _ratio(right, true),
        "f1": _ratio(2.0 * right, answered + true),
        "support": true,
    }


def f1(counts: NDArray[np.int64]) -> float:
    """Returns F1 of one row of `flag_counts` or of their sum, 0..1; 0 where nothing is right."""
    return flag_scores(counts)["f1"]


def pearson(said: Floats, right: Floats) -> float:
    """Returns Pearson's correlation, −1..1; 0 where one side is the same everywhere."""
    a, b = said - said.mean(), right - right.mean()
    return _ratio(float(a @ b), math.sqrt(float(a @ a) * float(b @ b)))


def spearman(said: Floats, right: Floats) -> float:
    """Returns Spearman's rank correlation, −1..1; equal values share the mean of their ranks."""
    return pearson(_ranks(said), _ranks(right))


def _ranks(values: Floats) -> Floats:
    _, where, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[where.reshape(-1)]


def perplexity(negative_log_likelihood: float, tokens: float) -> float:
    """Returns exp of the mean loss per token; inf when that is beyond a float."""
    mean = _ratio(negative_log_likelihood, tokens)
    return math.exp(mean) if mean < math.log(np.finfo(np.float64).max) else math.inf


def token_accuracy(right: float, tokens: float) -> float:
    """Returns the share of tokens that were the likeliest, 0..1."""
    return _ratio(right, tokens)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
