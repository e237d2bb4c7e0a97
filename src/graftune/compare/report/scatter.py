"""Quality against a cost as inline SVG: a numbered point for each method, and the Pareto front."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from graftune.compare.report.charts import (
    BOTTOM,
    HEIGHT,
    RIGHT,
    WIDTH,
    _axes,
    _Plane,
    _svg,
    ticks,
)
from graftune.compare.report.words import number

LOG_FROM = 20
"""Costs that differ by more than so many times are drawn on a logarithmic axis."""
_ZERO = 0.3
"""Where zero is drawn on a logarithmic axis, as a share of the least cost."""


@dataclass(frozen=True)
class Point:
    """One method: its number and colour, its cost, its quality with the interval's ends."""

    name: str
    number: int
    x: float
    y: float
    low: float | None = None
    high: float | None = None


def front(points: Sequence[Point], *, is_falling: bool = False) -> list[Point]:
    """Returns the points that no other beats in cost without losing quality, cheapest first.

    Example:
        >>> found = [Point("a", 1, 1, 0.5), Point("b", 2, 2, 0.4), Point("c", 3, 3, 0.9)]
        >>> [one.name for one in front(found)]
        ['a', 'c']
    """
    sign = -1 if is_falling else 1
    kept: list[Point] = []
    for one in sorted(points, key=lambda point: (point.x, -sign * point.y)):
        if not kept or sign * one.y > sign * kept[-1].y:
            kept.append(one)
    return kept


def scatter(
    title: str,
    points: Sequence[Point],
    *,
    x_label: str,
    x_format: Callable[[float], str] = number,
    y_format: Callable[[float], str] = number,
    is_falling: bool = False,
) -> Markup:
    """Returns the points over a pair of axes, their intervals, and a line along the front."""
    if not points:
        return Markup("")
    above = sorted(point.x for point in points if point.x > 0)
    is_log = bool(above) and above[-1] / above[0] > LOG_FROM
    ends = [y for point in points for y in (point.low, point.y, point.high) if y is not None]
    y_ticks = ticks(min(ends), max(ends), 5)
    zero = above[0] * _ZERO if is_log else 0.0
    at = {point.number: point.x if point.x > 0 or not is_log else zero for point in points}
    left, right = (min(at.values()), max(at.values())) if is_log else (0.0, max(at.values()) or 1.0)
    place = _Plane(left, right, y_ticks[0], y_ticks[-1], is_log)
    parts = [_axes(place, [], y_ticks, x_label, y_format), _x_ticks(place, zero, x_format)]
    parts.append(_front_line(place, front(points, is_falling=is_falling), at))
    parts += [_mark(place, point, at[point.number], x_format, y_format) for point in points]
    return _svg("chart", HEIGHT, title, parts)


def _x_ticks(place: _Plane, zero: float, x_format: Callable[[float], str]) -> Markup:
    values = _powers(place.x0, place.x1) if place.is_log else ticks(place.x0, place.x1, 5)
    shown = [(value, x_format(value)) for value in values if place.x0 <= value <= place.x1]
    if place.is_log and place.x0 == zero:
        shown = [(zero, "0"), *(pair for pair in shown if pair[0] > zero * 2)]
    return Markup("").join(
        Markup('<text class="tick mid" x="{}" y="{}">{}</text>').format(
            place.x(value), HEIGHT - BOTTOM + 16, text
        )
        for value, text in shown
    )


def _powers(low: float, high: float) -> list[float]:
    """Returns powers of ten within the range, or its ends where there are too few."""
    found = [10.0**power for power in range(-6, 16) if low <= 10.0**power <= high]
    return found[:: 1 + len(found) // 7] if len(found) > 1 else [low, high]


def _front_line(place: _Plane, points: Sequence[Point], at: dict[int, float]) -> Markup:
    steps: list[str] = []
    for index, point in enumerate(points):
        if index:
            steps.append(f"H{place.x(at[point.number])}")
        steps.append(f"{'V' if index else f'M{place.x(at[point.number])} '}{place.y(point.y)}")
    return Markup('<path class="front" d="{}H{}"/>').format(" ".join(steps), WIDTH - RIGHT)


def _mark(
    place: _Plane,
    point: Point,
    at: float,
    x_format: Callable[[float], str],
    y_format: Callable[[float], str],
) -> Markup:
    x, y = place.x(at), place.y(point.y)
    title = f"{point.name}: {y_format(point.y)} at {x_format(point.x)}"
    whisker = Markup("")
    if point.low is not None and point.high is not None:
        title += f" (95 %: {y_format(point.low)} to {y_format(point.high)})"
        whisker = Markup('<path class="whisker" d="M{} {}V{}"/>').format(
            x, place.y(point.low), place.y(point.high)
        )
    return whisker + Markup(
        '<circle class="dot s{}" cx="{}" cy="{}" r="8"><title>{}</title></circle>'
        '<text class="on mid" x="{}" y="{}" dy="4">{}</text>'
    ).format((point.number - 1) % 8, x, y, title, x, y, point.number)
