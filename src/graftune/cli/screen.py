"""What is printed: JSON or tables on standard output, everything else on standard error."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any


def print_json(value: Any) -> None:
    """Prints a value as indented JSON on standard output."""
    print(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def print_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "", numbers: int = 1
) -> None:
    """Prints a table on standard output; columns from the `numbers`-th on are set to the right."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold", title_justify="left")
    if title:
        table.title, table.title_style = Text(title), "bold"
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index >= numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 160)
    console.print(table)


def print_classes(classes: Sequence[Mapping[str, Any]]) -> None:
    """Prints the scores of each kind of entity, if there are any."""
    from graftune.compare.report import words

    if classes:
        rows = [
            [
                one["label"],
                *(words.percent(one[key]) for key in ("precision", "recall", "f1")),
                words.number(one["support"]),
            ]
            for one in classes
        ]
        print_table(["entities", "precision", "recall", "F1", "number"], rows)


def print_pairs(pairs: Mapping[str, str] | Sequence[tuple[str, str]]) -> None:
    """Prints names and values in two columns on standard output."""
    rows = list(pairs.items() if isinstance(pairs, Mapping) else pairs)
    width = max((len(name) for name, _ in rows), default=0)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")
