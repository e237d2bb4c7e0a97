"""Prompts against a trained adapter: the wall time of both over the number of predictions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from graftune.compare.report import words
from graftune.compare.report.charts import Series, line_chart
from graftune.tasks.prompt_costs import per_prediction

Run = Mapping[str, Any]
_SHOWN = 1000
"""Predictions drawn where the lines never meet."""


def sentence(run: Run) -> str:
    """Returns after how many predictions the adapter was cheaper; "" without a comparison.

    Example:
        >>> sentence({"costs": {"rows": 2, "seconds": 1.0, "start_seconds": 0.0},
        ...     "against": {"name": "lora", "predictions": 50, "costs":
        ...     {"rows": 10, "seconds": 1.0, "start_seconds": 20.0}}})
        'after 50 predictions lora is cheaper: training took 20 s, a prediction 100 ms against 500
        ms'
    """
    other = run.get("against") or {}
    if not other:
        return ""
    ours, theirs = per_prediction(run["costs"]), per_prediction(other["costs"])
    each = f"a prediction {words.moment(theirs)} against {words.moment(ours)}"
    if other["predictions"] is None:
        return f"{other['name']} is never cheaper: {each}"
    return (
        f"after {words.number(other['predictions'])} predictions {other['name']} is cheaper: "
        f"training took {words.duration(other['costs']['start_seconds'])}, {each}"
    )


def series(run: Run) -> list[Series]:
    """Returns the two lines, the adapter's ringed where they cross; [] without a comparison."""
    other = run.get("against") or {}
    if not other:
        return []
    meet: int | None = other["predictions"]
    ends = (0.0, float(meet or 0), 2.0 * (meet or 0)) if meet else (0.0, float(_SHOWN))
    return [
        Series(name, tuple((n, _seconds(costs, n)) for n in ends), colour, True, best)
        for colour, (name, costs, best) in enumerate(
            (
                ("prompts", run["costs"], None),
                (str(other["name"]), other["costs"], 1 if meet else None),
            )
        )
    ]


def chart(run: Run) -> Markup:
    """Returns the lines as a drawing; empty without a comparison."""
    return line_chart(
        "Wall time by predictions",
        series(run),
        x_label="predictions",
        y_format=words.duration,
        from_zero=True,
    )


def _seconds(costs: Mapping[str, float], predictions: float) -> float:
    """Returns the wall time of so many predictions, what comes before the first included."""
    return costs.get("start_seconds", 0.0) + predictions * (per_prediction(costs) or 0.0)
