"""A heat map as inline SVG: a cell for each row and column, its value in it or on hovering."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

from graftune.compare.report.charts import WIDTH

CELL_HEIGHT, NAME_WIDTH, TOP = 20, 168, 22
MOST_LETTERS = 22
"""A row's longer name is cut at its beginning; the tooltip has all of it."""
MOST_COLUMNS = 18
"""More take the page's whole width, so that their numbers still have room."""
LONG_WIDTH = 1000
NARROWEST_TEXT = 17
"""Narrower cells show no number."""


def heat_map(found: Mapping[str, Any]) -> Markup:
    """Returns a drawing of a `HeatMap` as a dictionary: title, rows, columns, values by row.

    The darkest cell is the largest value; where a value is None there is no cell. Every cell has a
    tooltip with its row, column and value.
    """
    rows, columns = list(found["rows"]), list(found["columns"])
    values = [[_number(value) for value in line] for line in found["values"]]
    known = [value for line in values for value in line if value is not None]
    if not known:
        return Markup("")
    is_long = len(columns) > MOST_COLUMNS
    room = LONG_WIDTH if is_long else WIDTH
    most, width = max(*known, 0.0) or 1.0, (room - NAME_WIDTH) / len(columns)
    parts = [_columns(columns, width)]
    for at, (name, line) in enumerate(zip(rows, values, strict=True)):
        y = TOP + at * CELL_HEIGHT
        parts.append(_row_name(name, y))
        for column, value in enumerate(line):
            if value is not None:
                title = f"{name}, {columns[column]}: {shown(value)}"
                parts.append(_cell(column, y, width, value, max(value, 0.0) / most, title))
    height = TOP + len(rows) * CELL_HEIGHT + 4
    opening = Markup('<svg class="heat{}" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(
        " long" if is_long else "", room, height, escape(str(found["title"]))
    )
    return opening + Markup("").join(parts) + Markup("</svg>")


def shown(value: float) -> str:
    """Returns a value as a cell has room for it.

    Example:
        >>> [shown(value) for value in (8, 0.0, 0.125, 7.5, 12.25)]
        ['8', '0', '.12', '7.5', '12']
    """
    if value == int(value):
        return str(int(value))
    if abs(value) < 1:
        return f"{value:.2f}".replace("0.", ".", 1)
    return f"{value:.1f}" if abs(value) < 10 else f"{value:.0f}"


def _number(value: Any) -> float | None:
    return None if value is None or value != value else float(value)


def _columns(columns: Sequence[str], width: float) -> Markup:
    longest = 8 * len(max(columns, key=len)) + 6
    step = 1 + int(longest // width)  # so that names don't overlap
    return Markup("").join(
        Markup('<text class="tick mid" x="{:.1f}" y="{}">{}</text>').format(
            NAME_WIDTH + (at + 0.5) * width, TOP - 7, name
        )
        for at, name in enumerate(columns)
        if at % step == 0
    )


def _row_name(name: str, y: float) -> Markup:
    short = name if len(name) <= MOST_LETTERS else f"…{name[-MOST_LETTERS:]}"
    return Markup('<text class="tick end" x="{}" y="{}">{}<title>{}</title></text>').format(
        NAME_WIDTH - 6, y + 14, short, name
    )


def _cell(column: int, y: float, width: float, value: float, share: float, title: str) -> Markup:
    x = NAME_WIDTH + column * width
    cell = Markup(
        '<rect class="cell" style="--v:{:.2f}" x="{:.1f}" y="{}" width="{:.1f}" height="{}">'
        "<title>{}</title></rect>"
    ).format(share, x, y, max(width - 1, 1), CELL_HEIGHT - 1, title)
    text = shown(value)
    if width < max(NARROWEST_TEXT, 8 * len(text)):
        return cell
    return cell + Markup('<text class="in mid" x="{:.1f}" y="{}">{}</text>').format(
        x + width / 2, y + 14, text
    )
