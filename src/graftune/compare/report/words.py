"""Numbers as a reader says them: 91.9 %, 1.3 MB, 2 min 5 s."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from graftune.tasks.measured import LOWER_IS_BETTER as LOWER_IS_BETTER

METRICS = {
    "accuracy": "accuracy",
    "macro_f1": "macro F1",
    "micro_f1": "micro F1",
    "subset_accuracy": "whole set right",
    "mcc": "Matthews correlation",
    "entity_f1": "entity F1",
    "entity_precision": "entity precision",
    "entity_recall": "entity recall",
    "exact_match": "exact match",
    "accuracy_at_1": "accuracy@1",
    "mrr": "mean reciprocal rank",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rouge_l": "ROUGE-L",
    "bleu": "BLEU",
    "chrf": "chrF",
    "f1": "F1",
    "pearson": "Pearson correlation",
    "spearman": "Spearman correlation",
    "rmse": "root mean squared error",
    "mae": "mean absolute error",
    "perplexity": "perplexity",
    "bits_per_byte": "bits per byte",
    "token_accuracy": "token accuracy",
    "loss": "loss",
}
"""How a metric is called in text; a metric that isn't here is called by its key."""

SHARES = frozenset(
    {
        *("micro_f1", "subset_accuracy"),
        *("accuracy", "macro_f1", "token_accuracy", "exact_match", "house_style"),
        *("entity_f1", "entity_precision", "entity_recall", "f1", "accuracy_at_1"),
        *("rouge1", "rouge2", "rouge_l", "bleu", "chrf"),
    }
)
"""Metrics between 0 and 1 that read best as per cent."""

MAIN_METRICS = (
    *(
        "accuracy",
        "house_style",
        "entity_f1",
        "f1",
        "micro_f1",
        "pearson",
        "spearman",
        "rmse",
        "mae",
        "mrr",
        "rouge_l",
    ),
    *("token_accuracy", "perplexity", "loss"),
)
"""The metric a run is judged by: the first of these that it has."""


def metric_name(key: str) -> str:
    """Returns a metric's name in text."""
    return METRICS.get(key, key.replace("_", " "))


def metric_value(key: str, value: float | None) -> str:
    """Returns a metric's value in text.

    Example:
        >>> metric_value("accuracy", 0.9187), metric_value("perplexity", 3.21049)
        ('91.9 %', '3.21')
    """
    if value is None:
        return "–"
    return percent(value) if key in SHARES else number(value)


def percent(share: float | None, digits: int = 1) -> str:
    """Returns a share as per cent; small shares keep two digits that say something.

    Example:
        >>> percent(0.9187), percent(0.00034), percent(None)
        ('91.9 %', '0.034 %', '–')
    """
    if share is None or not math.isfinite(share):
        return "–"
    if 0 < abs(share) < 0.01:
        return f"{share * 100:.2g} %"
    return f"{share * 100:.{digits}f} %"


def number(value: float | None) -> str:
    """Returns a plain number: whole ones with separators, others with three or four digits.

    Example:
        >>> number(22713216), number(0.00123456), number(3.14159)
        ('22,713,216', '0.001235', '3.142')
    """
    if value is None:
        return "–"
    if not math.isfinite(value):
        return str(value)
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.4g}"


def size(count: float | None) -> str:
    """Returns bytes in decimal units.

    Example:
        >>> size(1_301_000), size(812), size(None)
        ('1.3 MB', '812 B', '–')
    """
    if count is None:
        return "–"
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if value >= 100 or unit == "B" else f"{value:.1f} {unit}"


def duration(seconds: float | None) -> str:
    """Returns a time span.

    Example:
        >>> duration(4.26), duration(125), duration(7260)
        ('4.3 s', '2 min 5 s', '2 h 1 min')
    """
    if seconds is None or not math.isfinite(seconds):
        return "–"
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def moment(seconds: float | None) -> str:
    """Returns a time span that may be far below a second.

    Example:
        >>> moment(0.0314), moment(4.26), moment(None)
        ('31 ms', '4.3 s', '–')
    """
    if seconds is None or seconds >= 1 or not math.isfinite(seconds):
        return duration(seconds)
    return f"{seconds * 1000:.2g} ms" if seconds < 0.1 else f"{seconds * 1000:.0f} ms"


def plain(value: Any) -> str:
    """Returns any JSON value as one short text for a table's cell."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "–"
    if isinstance(value, int | float):
        return number(value)
    if isinstance(value, list | tuple):
        return ", ".join(plain(item) for item in value) or "–"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {plain(item)}" for key, item in value.items()) or "–"
    return str(value)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Returns nested settings as rows of dotted name and text.

    Example:
        >>> flatten({"train": {"lr": 0.001}, "base": "demo:minilm"})
        [('train.lr', '0.001'), ('base', 'demo:minilm')]
    """
    rows: list[tuple[str, str]] = []
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            rows += flatten(value, f"{name}.")
        else:
            rows.append((name, plain(value)))
    return rows
