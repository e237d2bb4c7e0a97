"""What a confusion matrix says: per-class scores, and which classes are taken for which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MOST_CLASSES = 60
"""More classes than this make a matrix no one can read; the page then lists only the confusions."""
MOST_CONFUSIONS = 10
MOST_EXAMPLES = 3
LONGEST_EXAMPLE = 240


@dataclass(frozen=True)
class Cell:
    """One cell of the matrix: how many, and its share of the row."""

    count: int
    share: float
    is_diagonal: bool
    title: str


@dataclass(frozen=True)
class ClassRow:
    """One class's scores."""

    label: str
    precision: float
    recall: float
    f1: float
    support: int


@dataclass(frozen=True)
class Confusion:
    """One class taken for another, with rows where it happened."""

    label: str
    predicted: str
    count: int
    support: int
    examples: tuple[str, ...]


def cells(matrix: Sequence[Sequence[int]], labels: Sequence[str]) -> list[list[Cell]]:
    """Returns the matrix (rows: true class, columns: predicted) with shares of each row."""
    table: list[list[Cell]] = []
    for i, row in enumerate(matrix):
        total = max(sum(row), 1)
        table.append(
            [
                Cell(n, n / total, i == j, f"{labels[i]} → {labels[j]}: {n} of {total}")
                for j, n in enumerate(row)
            ]
        )
    return table


def class_rows(matrix: Sequence[Sequence[int]], labels: Sequence[str]) -> list[ClassRow]:
    """Returns precision, recall and F1 of each class, in the labels' order; 0 where undefined.

    Example:
        >>> [row.f1 for row in class_rows([[2, 0], [2, 0]], ["a", "b"])]
        [0.6666666666666666, 0.0]
    """
    rows: list[ClassRow] = []
    for index, label in enumerate(labels):
        hits = matrix[index][index]
        support = sum(matrix[index])
        guessed = sum(row[index] for row in matrix)
        precision = hits / guessed if guessed else 0.0
        recall = hits / support if support else 0.0
        both = precision + recall
        rows.append(
            ClassRow(
                label, precision, recall, 2 * precision * recall / both if both else 0.0, support
            )
        )
    return rows


def worst_confusions(
    matrix: Sequence[Sequence[int]],
    labels: Sequence[str],
    predictions: Sequence[Mapping[str, Any]] = (),
) -> list[Confusion]:
    """Returns the most frequent mistakes, each with example rows where `predictions` holds any.

    Args:
        matrix: Counts, rows true and columns predicted.
        labels: The classes' names.
        predictions: Rows with "text" (maybe "text_pair"), "true" and "label" (the answer).
    """
    pairs = [
        (count, i, j)
        for i, row in enumerate(matrix)
        for j, count in enumerate(row)
        if i != j and count
    ]
    pairs.sort(key=lambda pair: (-pair[0], pair[1], pair[2]))
    return [
        Confusion(
            labels[i],
            labels[j],
            count,
            sum(matrix[i]),
            _examples(predictions, labels[i], labels[j]),
        )
        for count, i, j in pairs[:MOST_CONFUSIONS]
    ]


def _examples(rows: Sequence[Mapping[str, Any]], label: str, predicted: str) -> tuple[str, ...]:
    found = [
        row for row in rows if str(row.get("true")) == label and str(row.get("label")) == predicted
    ]
    return tuple(_shorten(row) for row in found[:MOST_EXAMPLES])


def _shorten(row: Mapping[str, Any]) -> str:
    text = " ⁄ ".join(str(row[key]) for key in ("text", "text_pair") if row.get(key))
    return text if len(text) <= LONGEST_EXAMPLE else text[: LONGEST_EXAMPLE - 1] + "…"
