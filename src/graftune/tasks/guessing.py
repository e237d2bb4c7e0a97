"""Which task rows are for, and what each of their columns could be, told from names and values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from graftune.errors import DataError
from graftune.tasks.settings import Columns
from graftune.tasks.tables import Table
from graftune.tasks.task import find_task

ORDER = ("labelling", "spans", "choices", "instruct", "classification")
"""Tasks, those whose rows can be no other's first."""
_TRIED = 50
"""Rows that are read to see whether a task can use them."""
_LOOKED_AT = 1000
"""Rows that are looked at to describe a column."""
_FEW = 50
"""Different values that a label has at most, where columns are only described."""
_EXAMPLE = 60
"""Letters of a column's first value that are shown."""


@dataclass(frozen=True)
class Guess:
    """What a table could be used for."""

    task: str
    """The likeliest task."""
    fits: dict[str, dict[str, str]]
    """Each task that can use the rows, and the column of each of its roles."""


def guess_task(table: Table, named: Columns) -> Guess:
    """Returns the task that a table's rows are for.

    Raises:
        DataError: No task can use them; it says what each of them lacks.
    """
    fits: dict[str, dict[str, str]] = {}
    lacks: list[str] = []
    for name in ORDER:
        try:
            fits[name] = _columns_for(name, table, named)
        except DataError as error:
            lacks.append(f"  {name}: {error}")
    if not fits:
        raise DataError(f"No task can use the rows of {table.source}:\n" + "\n".join(lacks))
    return Guess(next(iter(fits)), fits)


def describe_columns(table: Table, roles: dict[str, str]) -> list[dict[str, Any]]:
    """Returns for each column its name, role, types, number of values and what it could be."""
    rows = table.rows[:_LOOKED_AT]
    of = {column: role for role, column in roles.items()}
    found: list[dict[str, Any]] = []
    for column in table.columns:
        values = [row.get(column) for row in rows]
        there = [value for value in values if value not in (None, "")]
        distinct = len({repr(value) for value in there})
        found.append(
            {
                "column": column,
                "role": of.get(column, ""),
                "types": sorted({type(value).__name__ for value in there}),
                "distinct": distinct,
                "empty": len(values) - len(there),
                "could_be": _could_be(there, distinct),
                "example": str(there[0])[:_EXAMPLE] if there else "",
            }
        )
    return found


def _columns_for(name: str, table: Table, named: Columns) -> dict[str, str]:
    task = find_task(name, {"no_answer": True} if name == "spans" else None)
    columns = task.columns(table, named)
    if name == "choices" and "choices" not in columns:
        raise DataError("there is no column of choices.")
    sample = [table.alone(index) for index in range(min(_TRIED, len(table.rows)))]
    failed: list[str] = []
    for row in sample:
        try:
            task.examples(row, columns)
        except DataError as error:
            failed.append(str(error))
    if len(failed) * 2 > len(sample):
        raise DataError(failed[0])
    return columns


def _could_be(values: Sequence[Any], distinct: int) -> list[str]:
    """Returns the roles that values of these kinds could have."""
    kinds = {type(value) for value in values}
    if kinds == {list}:
        inner = {type(item) for value in values for item in value}
        return ["messages"] if dict in inner else ["words", "tags", "choices"]
    if not kinds <= {str, int, float, bool} or not values:
        return []
    repeats = distinct <= _FEW and distinct * 2 <= len(values)
    spaced = kinds == {str} and sum(" " in value.strip() for value in values) * 2 > len(values)
    return ["label"] * repeats + ["text", "instruction", "context"] * spaced
