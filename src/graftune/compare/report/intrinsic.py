"""The page of a search for the intrinsic dimension: its curve, its runs, what was found."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from markupsafe import Markup

from graftune.compare.report import words
from graftune.compare.report.charts import Series, line_chart
from graftune.compare.report.report import fill
from graftune.compare.report.report import write_page as write

if TYPE_CHECKING:
    from graftune.compare.intrinsic import Dimension


def write_page(found: Dimension, path: str | os.PathLike[str]) -> Path:
    """Writes the page, one HTML file that needs nothing else, and returns its path."""
    page = fill(
        "intrinsic.html.j2",
        verdict=verdict(found),
        title=f"{words.metric_name(found.metric)} by intrinsic dimension",
        curve=curve(found),
        columns=COLUMNS,
        rows=rows(found),
        dims=[point.d for point in found.points],
        found=found.found,
        reference_from=found.reference_from,
    )
    return write(page, path)


COLUMNS = ("d", "held-out rows", "of the reference", "learning rate", "time")


def rows(found: Dimension) -> list[list[str]]:
    """Returns the points as a table's cells."""
    return [
        [
            words.number(point.d),
            words.metric_value(found.metric, point.value),
            words.percent(point.value / found.reference if found.reference else None),
            f"{point.lr:g}",
            words.duration(point.seconds),
        ]
        for point in found.points
    ]


def verdict(found: Dimension) -> str:
    """Returns one sentence: the dimension, or that none of those tried is enough."""
    reference = words.metric_value(found.metric, found.reference)
    bar = words.metric_value(found.metric, found.bar)
    name = words.metric_name(found.metric)
    if found.found is None:
        most = max(found.points, key=lambda point: point.value)
        return (
            f"{found.name} lies above {words.number(found.points[-1].d)}: the best of those tried "
            f"is {words.metric_value(found.metric, most.value)} {name} at d = "
            f"{words.number(most.d)}, and {bar} is needed ({found.share:.0%} of {reference})"
        )
    at_most = "at most " if found.found == found.points[0].d else ""
    return (
        f"{found.name} is {at_most}{words.number(found.found)}: the smallest d tried with at least "
        f"{bar} {name}, {found.share:.0%} of full fine-tuning's {reference}"
    )


def curve(found: Dimension) -> Markup:
    """Returns the metric over d, on a logarithmic axis, with the bar to reach."""
    dims = [point.d for point in found.points]
    best = dims.index(found.found) if found.found is not None else None
    points = tuple((float(point.d), point.value) for point in found.points)
    name = words.metric_name(found.metric)
    return line_chart(
        f"{name} by intrinsic dimension",
        [Series(name, points, 0, is_marked=True, best=best)],
        x_label="d",
        y_format=lambda value: words.metric_value(found.metric, value),
        is_log=True,
        bar=(f"{found.share:.0%} of full", found.bar),
    )
