"""Line and bar charts as inline SVG: axes, a mark and a tooltip per point, no script."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from graftune.compare.report.words import number

WIDTH, HEIGHT = 480, 260
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 12, 40
MOST_POINTS = 400
"""A longer curve is drawn as means over equal runs of its points, to keep the page small."""


@dataclass(frozen=True)
class Series:
    """One curve: its name in the legend and its points (x, y)."""

    name: str
    points: tuple[tuple[float, float], ...]
    colour: int
    """Which of the page's eight colours, from 0."""
    is_marked: bool = False
    """Whether each point is drawn as a dot (few points) or only found by hovering."""
    best: int | None = None
    """Index of the point to ring."""


@dataclass(frozen=True)
class Bar:
    """One bar: its label, length, text, and the ends of its whisker."""

    label: str
    value: float
    text: str
    colour: int
    low: float | None = None
    high: float | None = None


def thinned(points: Sequence[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """Returns at most `MOST_POINTS` points: means over equal runs of the given ones.

    Example:
        >>> len(thinned([(i, 0.0) for i in range(1000)])), thinned([(1, 2.0)])
        (334, ((1, 2.0),))
    """
    run = math.ceil(len(points) / MOST_POINTS)
    if run <= 1:
        return tuple(points)
    chunks = [points[start : start + run] for start in range(0, len(points), run)]
    return tuple((chunk[-1][0], sum(y for _, y in chunk) / len(chunk)) for chunk in chunks)


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Returns round values that cover [low, high], at most about `most` of them.

    Example:
        >>> ticks(0, 0.93)
        [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    if high <= low:
        high = low + (abs(low) or 1.0)
    raw = (high - low) / max(most - 1, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(f * power for f in (1, 2, 2.5, 5, 10) if f * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str,
    y_format: Callable[[float], str] = number,
    from_zero: bool = False,
    is_log: bool = False,
    bar: tuple[str, float] | None = None,
) -> Markup:
    """Returns curves over one pair of axes; the horizontal one starts at 0.

    Args:
        title: What the chart shows, for screen readers.
        series: The curves; one without points is left out.
        x_label: Name of the horizontal axis.
        y_format: How a value is written on the axis and in tooltips.
        from_zero: Whether the vertical axis starts at 0 even if no point comes near.
        is_log: Whether the horizontal axis is logarithmic, with a tick at each point.
        bar: A name and a value to draw a horizontal line at.
    """
    series = [one for one in series if one.points]
    if not series:
        return Markup("")
    xs = [x for one in series for x, _ in one.points]
    ys = [y for one in series for _, y in one.points] + ([0.0] if from_zero else [])
    ys += [bar[1]] if bar else []
    left, right = (min(xs), max(xs)) if is_log else (min(0.0, *xs), max(*xs, 1e-9))
    x_ticks = sorted(set(xs)) if is_log else ticks(left, right, 7)
    y_ticks = ticks(min(ys), max(ys), 5)
    place = _Plane(left, right, y_ticks[0], y_ticks[-1], is_log)
    parts = [_axes(place, x_ticks, y_ticks, x_label, y_format)]
    parts += [_bar_line(place, *bar, y_format)] if bar else []
    parts += [_curve(place, one, x_label, y_format) for one in series]
    return _svg("chart", HEIGHT, title, parts)


def bar_chart(title: str, bars: Sequence[Bar], *, most: float | None = None) -> Markup:
    """Returns horizontal bars with their labels above and their values at the end."""
    if not bars:
        return Markup("")
    end = most or max(bar.high or bar.value for bar in bars) or 1.0
    room = WIDTH - 100
    parts: list[Markup] = []
    for index, bar in enumerate(bars):
        top = 4 + index * 46
        length = max(room * bar.value / end, 1.0)
        parts.append(
            Markup(
                '<text class="name" x="0" y="{}">{}</text><rect class="track" x="0" y="{}" '
                'width="{}" height="16" rx="3"/><rect class="bar s{}" x="0" y="{}" width="{}" '
                'height="16" rx="3"><title>{}: {}</title></rect>{}'
                '<text class="value" x="{}" y="{}">{}</text>'
            ).format(
                top + 12, bar.label, top + 18, room, bar.colour, top + 18, _f(length),
                bar.label, bar.text, _whisker(bar, room / end, top + 26), room + 8, top + 31,
                bar.text,
            )
        )  # fmt: skip
    return _svg("bars", 8 + 46 * len(bars), title, parts)


@dataclass(frozen=True)
class _Plane:
    """The map from values to pixels."""

    x0: float
    x1: float
    y0: float
    y1: float
    is_log: bool = False

    def x(self, value: float) -> str:
        """Returns the horizontal place of a value."""
        span = WIDTH - LEFT - RIGHT
        if self.is_log:
            whole = math.log(self.x1 / self.x0) or 1.0
            return _f(LEFT + 12 + (span - 24) * math.log(value / self.x0) / whole)
        return _f(LEFT + span * (value - self.x0) / (self.x1 - self.x0))

    def y(self, value: float) -> str:
        """Returns the vertical place of a value."""
        span = HEIGHT - TOP - BOTTOM
        return _f(TOP + span * (self.y1 - value) / (self.y1 - self.y0))


def _axes(
    place: _Plane,
    x_ticks: Sequence[float],
    y_ticks: Sequence[float],
    x_label: str,
    y_format: Callable[[float], str],
) -> Markup:
    bottom = HEIGHT - BOTTOM
    parts = [
        Markup('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(
            LEFT, WIDTH - RIGHT, place.y(tick), place.y(tick)
        )
        + Markup('<text class="tick end" x="{}" y="{}" dy="4">{}</text>').format(
            LEFT - 6, place.y(tick), y_format(tick)
        )
        for tick in y_ticks
    ]
    parts += [
        Markup('<text class="tick mid" x="{}" y="{}">{}</text>').format(
            place.x(tick), bottom + 16, number(tick)
        )
        for tick in x_ticks
        if place.x0 <= tick <= place.x1
    ]
    parts.append(
        Markup('<line class="axis" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(
            LEFT, WIDTH - RIGHT, bottom, bottom
        )
    )
    parts.append(
        Markup('<text class="tick mid" x="{}" y="{}">{}</text>').format(
            (LEFT + WIDTH - RIGHT) // 2, HEIGHT - 6, x_label
        )
    )
    return Markup("").join(parts)


def _bar_line(place: _Plane, name: str, value: float, y_format: Callable[[float], str]) -> Markup:
    return Markup(
        '<line class="whisker" stroke-dasharray="5 4" x1="{}" x2="{}" y1="{}" y2="{}">'
        '<title>{}: {}</title></line><text class="tick end" x="{}" y="{}" dy="-5">{}</text>'
    ).format(
        LEFT, WIDTH - RIGHT, place.y(value), place.y(value), name, y_format(value),
        WIDTH - RIGHT, place.y(value), f"{name} {y_format(value)}",
    )  # fmt: skip


def _curve(place: _Plane, series: Series, x_label: str, y_format: Callable[[float], str]) -> Markup:
    path = " ".join(f"{place.x(x)},{place.y(y)}" for x, y in series.points)
    parts = [
        Markup('<polyline class="line s{}" points="{}"/>').format(series.colour, path),
    ]
    for index, (x, y) in enumerate(series.points):
        kind = "dot" if series.is_marked else "spot"
        if index == series.best:
            kind += " best"
        parts.append(
            Markup(
                '<circle class="{} s{}" cx="{}" cy="{}" r="4"><title>{}</title></circle>'
            ).format(
                kind,
                series.colour,
                place.x(x),
                place.y(y),
                f"{series.name}: {y_format(y)} at {x_label} {number(x)}",
            )
        )
    return Markup('<g data-points="{}">').format(len(series.points)) + (
        Markup("").join(parts) + Markup("</g>")
    )


def _whisker(bar: Bar, scale: float, y: float) -> Markup:
    if bar.low is None or bar.high is None:
        return Markup("")
    return Markup('<path class="whisker" d="M{} {}H{}M{} {}v10M{} {}v10"/>').format(
        _f(bar.low * scale), y, _f(bar.high * scale),
        _f(bar.low * scale), y - 5, _f(bar.high * scale), y - 5,
    )  # fmt: skip


def _svg(kind: str, height: int, title: str, parts: Sequence[Markup]) -> Markup:
    opening = Markup('<svg class="{}" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(
        kind, WIDTH, height, escape(title)
    )
    return opening + Markup("").join(parts) + Markup("</svg>")


def _f(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
