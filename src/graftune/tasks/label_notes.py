"""Labels as names, and what is odd about the values they are made from."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from graftune.tasks.tables import Table

_KINDS = {"str": "text", "bool": "true or false", "int": "whole number", "float": "decimal number"}
_NOTHING = ("nan", "na", "n/a", "none", "null", "undefined", "#n/a")
_SHOWN = 6
"""Labels that a note lists."""


def label_of(value: Any) -> str:
    """Returns a label as text; 1, 1.0 and " 1 " are the same label."""
    if isinstance(value, float):
        value = int(value) if value.is_integer() else "" if value != value else value
    return "" if value is None else str(value).strip()


def label_notes(table: Table, column: str | None, split: str) -> list[str]:
    """Returns what a user should know about the labels' spellings, a sentence each.

    Example:
        >>> label_notes(Table([{"y": 1}, {"y": "1"}], "a.json"), "y", "train")
        ['The train labels are of several types: 1 text, 1 whole number; 1, 1.0 and "1" count as
        one label.']
    """
    if column is None:
        return []
    kinds: dict[str, int] = defaultdict(int)
    names: dict[str, int] = defaultdict(int)
    for row in table.rows:
        value = row.get(column)
        name = label_of(value)
        if name:
            kinds[_KINDS.get(type(value).__name__, "other")] += 1
            names[name] += 1
    notes = [_types(kinds, split)] if len(kinds) > 1 else []
    texts = [name for name in names if not _is_number(name)]
    numbers = [name for name in names if _is_number(name)]
    if texts and numbers:
        notes.append(
            f"The {split} labels are numbers and words: {_listed(numbers)} and {_listed(texts)}."
        )
    empty = {name: count for name, count in names.items() if name.lower() in _NOTHING}
    if empty:
        said = ", ".join(f'"{name}" ({count} rows)' for name, count in empty.items())
        notes.append(
            f"{said} is taken for a {split} label; if it means none, leave such cells empty."
        )
    return [*notes, *_alike(names, bool(kinds.get("text")), split)]


def _types(kinds: dict[str, int], split: str) -> str:
    said = ", ".join(f"{count:,} {kind}" for kind, count in sorted(kinds.items()))
    return f'The {split} labels are of several types: {said}; 1, 1.0 and "1" count as one label.'


def _alike(names: Iterable[str], has_texts: bool, split: str) -> list[str]:
    """Returns a note on labels that differ in case, spaces or decimals only."""
    alike: dict[str, list[str]] = defaultdict(list)
    for name in names if has_texts else ():
        alike[f"{float(name):g}" if _is_number(name) else " ".join(name.casefold().split())] += [
            name
        ]
    return [
        f"The {split} labels {_listed(found)} differ in writing only, and are different labels."
        for found in alike.values()
        if len(found) > 1
    ]


def _is_number(name: str) -> bool:
    try:
        return abs(float(name)) != float("inf") and float(name) == float(name)
    except ValueError:
        return False


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f", … ({len(names)} in all)" if len(names) > _SHOWN else ""
    return ", ".join(f'"{name}"' for name in names[:_SHOWN]) + more
