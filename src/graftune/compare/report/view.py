"""A run's result as the page shows it: every number already chosen and worded."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from graftune.compare.report import break_even, words
from graftune.compare.report.charts import Series, line_chart, thinned
from graftune.compare.report.confusion import (
    MOST_CLASSES,
    Cell,
    ClassRow,
    Confusion,
    cells,
    class_rows,
    worst_confusions,
)
from graftune.compare.report.heatmap import heat_map
from graftune.tasks.prompt_costs import per_prediction

Run = Mapping[str, Any]
"""A RunResult as JSON, plus "predictions": rows of its test set, where they were written."""
Rows = list[tuple[str, str]]

MOST_SAMPLES = 12
"""Generated answers shown, from the first of the test set."""

_ANSWERS = (
    *(("before", "the base"), ("answer", "with the adapter"), ("expected", "expected")),
    ("true", "expected"),
)
_NOT_METRICS = ("loss", "runtime", "per_second", "time", "epoch", "rows", "confusion")


@dataclass(frozen=True)
class Chart:
    """One drawing with its heading and legend (name, colour)."""

    title: str
    svg: Markup
    legend: tuple[tuple[str, int], ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Sample:
    """One question and how it was answered: (who answered, the answer)."""

    prompt: str
    answers: Rows


@dataclass(frozen=True)
class RunView:
    """One run's part of the page."""

    name: str
    verdict: str
    tiles: Rows
    charts: list[Chart]
    labels: list[str]
    matrix: list[list[Cell]]
    classes: list[ClassRow]
    confusions: list[Confusion]
    samples: list[Sample]
    parameters: Rows
    site_columns: list[str]
    sites: list[list[str]]
    settings: Rows
    versions: Rows
    data: Rows
    notes: list[str]
    command: str


def run_view(run: Run) -> RunView:
    """Returns what the page shows of one run."""
    labels = [str(label) for label in run.get("labels") or ()]
    matrix = run.get("confusion") or []
    columns, sites = _sites(run)
    return RunView(
        name=run_name(run),
        verdict=verdict(run),
        tiles=_tiles(run),
        charts=_break_even(run) + _charts(run) + _heat_maps(run),
        labels=labels,
        matrix=cells(matrix, labels) if 0 < len(labels) <= MOST_CLASSES and matrix else [],
        classes=class_rows(matrix, labels)
        if matrix
        else [ClassRow(**row) for row in run.get("classes") or ()],
        confusions=worst_confusions(matrix, labels, run.get("predictions") or ()),
        samples=_samples(run),
        parameters=_parameters(run),
        site_columns=columns,
        sites=sites,
        settings=words.flatten(run.get("settings") or {}),
        versions=words.flatten(run.get("versions") or {}),
        data=words.flatten(run.get("data") or {}),
        notes=[str(note) for note in run.get("notes") or ()],
        command=_command(run),
    )


def run_name(run: Run) -> str:
    """Returns what a run is called: the name it was given, else its method's."""
    method = (run.get("settings") or {}).get("method") or {}
    return str(run.get("name") or method.get("name") or "run")


def main_metric(run: Run) -> tuple[str, float] | None:
    """Returns the metric that a run is judged by and its value on held-out rows, or None."""
    scores = scores_of(run)
    return next(((key, scores[key]) for key in words.MAIN_METRICS if key in scores), None)


def scores_of(run: Run) -> dict[str, float]:
    """Returns the test metrics, or the validation metrics of a run without a test set."""
    metrics = run.get("metrics") or {}
    chosen = metrics.get("test") or metrics.get("validation") or {}
    found = {str(key).removeprefix("eval_").removeprefix("test_"): v for key, v in chosen.items()}
    return {key: float(v) for key, v in found.items() if _is_number(v)}


def split_of(run: Run) -> str:
    """Returns which split `scores_of` comes from."""
    return "test" if (run.get("metrics") or {}).get("test") else "validation"


def rows_tested(run: Run) -> int:
    """Returns how many rows the confusion matrix counts; 0 when there is none."""
    return sum(sum(row) for row in run.get("confusion") or ())


def margin(share: float, rows: int) -> tuple[float, float]:
    """Returns the 95 % Wilson interval of a share measured on `rows` rows.

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference".

    Example:
        >>> [round(end, 3) for end in margin(0.9, 100)]
        [0.826, 0.945]
    """
    if rows <= 0:
        return share, share
    z = 1.959964
    centre = share + z * z / (2 * rows)
    half = z * math.sqrt(share * (1 - share) / rows + z * z / (4 * rows * rows))
    scale = 1 + z * z / rows
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def trained_share(run: Run) -> float | None:
    """Returns trained parameters over the base's, or None when the run counted none."""
    parameters = run.get("parameters") or {}
    share: Any = parameters.get("share")
    return float(share) if _is_number(share) else None


def verdict(run: Run) -> str:
    """Returns the page's first line: what was reached, on how much, with how much trained."""
    main = main_metric(run)
    name = run_name(run)
    if main is None:
        return f"{name}: {_done(run)}, not yet measured on held-out rows"
    key, value = main
    text = f"{name}: {words.metric_value(key, value)}"
    rows = rows_tested(run)
    if key == "accuracy" and rows:
        low, high = margin(value, rows)
        text += f" ({low * 100:.1f}–{high * 100:.1f} %)"
    text += f" {words.metric_name(key)}"
    text += f" on {rows:,} {split_of(run)} rows" if rows else f" on the {split_of(run)} rows"
    share = trained_share(run)
    return f"{text}, {words.percent(share)} of the parameters trained" if share else text


def _done(run: Run) -> str:
    return "prompted" if run.get("kind") == "in-context" else "trained"


def _tiles(run: Run) -> Rows:
    scores = scores_of(run)
    tiles = [
        (f"{words.metric_name(key)}, {split_of(run)}", words.metric_value(key, scores[key]))
        for key in dict.fromkeys(("accuracy", "macro_f1", "mcc", *words.MAIN_METRICS))
        if key in scores
    ][:4]
    parameters = run.get("parameters") or {}
    if parameters.get("trainable") is not None:
        tiles.append(("parameters trained", words.number(parameters["trainable"])))
    if run.get("adapter_bytes"):
        tiles.append(("adapter on disk", words.size(run["adapter_bytes"])))
    if run.get("base_bytes"):
        tiles.append(("base model's weights", words.size(run["base_bytes"])))
    tiles += _costs(run)
    if run.get("seconds"):
        tiles.append(("whole run", words.duration(run["seconds"])))
    if run.get("peak_memory_bytes"):
        tiles.append(("peak memory", words.size(run["peak_memory_bytes"])))
    return tiles


def _costs(run: Run) -> Rows:
    """Returns what one prediction took."""
    costs = run.get("costs") or {}
    seconds, tokens = per_prediction(costs), per_prediction(costs, "tokens")
    tiles = [("a prediction", words.moment(seconds))] if seconds is not None else []
    if tokens is not None:
        tiles.append(("tokens run for a prediction", words.number(round(tokens, 1))))
    return tiles


def points(run: Run, key: str) -> tuple[tuple[float, float], ...]:
    """Returns (step, value) of every finite log entry that holds `key`."""
    found = [
        (float(row["step"]), float(row[key]))
        for row in run.get("history") or ()
        if _is_number(row.get(key)) and _is_number(row.get("step"))
    ]
    return thinned(found)


def curve_metrics(run: Run) -> list[str]:
    """Returns the evaluation metrics logged during training, without the "eval_" prefix."""
    found: dict[str, None] = {}
    for row in run.get("history") or ():
        for key, value in row.items():
            bare = str(key).removeprefix("eval_")
            if bare != key and _is_number(value) and not bare.endswith(_NOT_METRICS):
                found[bare] = None
    return list(found)


def _charts(run: Run) -> list[Chart]:
    charts = [
        _chart(
            "Loss", (("training", points(run, "loss")), ("validation", points(run, "eval_loss")))
        ),
        _metric_chart(run),
        _chart("Learning rate", (("learning rate", points(run, _rate_key(run))),), from_zero=True),
        _chart("Gradient norm", (("gradient norm", points(run, "grad_norm")),), from_zero=True),
    ]
    return [chart for chart in charts if chart is not None]


def _break_even(run: Run) -> list[Chart]:
    """Returns the costs of prompts beside those of the adapter they are compared with."""
    lines = break_even.series(run)
    if not lines:
        return []
    legend = tuple((one.name, one.colour) for one in lines)
    note = break_even.sentence(run)
    return [Chart("Cost", break_even.chart(run), legend, note[:1].upper() + note[1:] + ".")]


def _heat_maps(run: Run) -> list[Chart]:
    """Returns what the method has to show of the trained adapter."""
    found = [(one, heat_map(one)) for one in run.get("heat_maps") or ()]
    return [
        Chart(str(one["title"]), svg, note=str(one.get("note") or "")) for one, svg in found if svg
    ]


def _chart(
    title: str,
    curves: Sequence[tuple[str, tuple[tuple[float, float], ...]]],
    *,
    from_zero: bool = False,
) -> Chart | None:
    series = [
        Series(name, found, colour, is_marked=len(found) <= 40)
        for colour, (name, found) in enumerate(curves)
        if found
    ]
    if not series:
        return None
    svg = line_chart(f"{title} by step", series, x_label="step", from_zero=from_zero)
    legend = tuple((one.name, one.colour) for one in series) if len(series) > 1 else ()
    return Chart(title, svg, legend)


def _metric_chart(run: Run) -> Chart | None:
    keys = [key for key in curve_metrics(run) if key in words.SHARES or key == "mcc"]
    keys = keys or curve_metrics(run)[:1]
    series: list[Series] = []
    for colour, key in enumerate(keys):
        found = points(run, f"eval_{key}")
        values = [y for _, y in found]
        best = values.index(min(values) if key in words.LOWER_IS_BETTER else max(values))
        series.append(Series(words.metric_name(key), found, colour, is_marked=True, best=best))
    if not series:
        return None
    svg = line_chart("Validation metrics by step", series, x_label="step")
    legend = tuple((one.name, one.colour) for one in series)
    return Chart("Validation", svg, legend, "The ringed point is each curve's best.")


def _samples(run: Run) -> list[Sample]:
    rows = [row for row in run.get("predictions") or () if row.get("answer") is not None]
    return [
        Sample(
            _question(row),
            [(name, _said(row[key])) for key, name in _ANSWERS if row.get(key)],
        )
        for row in rows[:MOST_SAMPLES]
    ]


def _said(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _question(row: Mapping[str, Any]) -> str:
    asked = [turn for turn in row.get("messages") or () if turn.get("role") == "user"]
    if asked:
        return str(asked[-1]["content"])
    return str(row.get("question") or row.get("instruction") or "")


def _parameters(run: Run) -> Rows:
    parameters = run.get("parameters") or {}
    rows = [
        ("trained", words.number(parameters.get("trainable"))),
        ("changed when applied", words.number(parameters.get("changed"))),
        ("base model", words.number(parameters.get("base"))),
        ("trained, share of the base", words.percent(trained_share(run))),
        ("adapter on disk", words.size(run.get("adapter_bytes") or parameters.get("bytes"))),
        ("base model's weights", words.size(run.get("base_bytes"))),
    ]
    return [row for row in rows if row[1] != "–"]


def _sites(run: Run) -> tuple[list[str], list[list[str]]]:
    sites = [site for site in (run.get("parameters") or {}).get("sites") or () if site]
    columns = list(dict.fromkeys(str(key) for site in sites for key in site))
    return columns, [[words.plain(site.get(column)) for column in columns] for site in sites]


def _command(run: Run) -> str:
    folder = run.get("run_dir")
    return f"graftune train {Path(str(folder)) / 'run.yaml'} --out {folder}-again" if folder else ""


def _rate_key(run: Run) -> str:
    history = run.get("history") or ()
    return "learning_rate" if any("learning_rate" in row for row in history) else "lr"


def _is_number(value: Any) -> bool:
    is_real = isinstance(value, int | float) and not isinstance(value, bool)
    return is_real and math.isfinite(value)


def predictions_of(run_dir: Any) -> list[dict[str, Any]]:
    """Returns the rows of a run directory's predictions.test.jsonl; none without that file."""
    if not run_dir:
        return []
    path = Path(str(run_dir)) / "predictions.test.jsonl"
    if not path.is_file():
        return []
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]
