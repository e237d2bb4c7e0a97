"""The page of a comparison of methods: verdict, choice, table, costs, curves, rows, each method."""

from __future__ import annotations

import base64
import dataclasses
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftune.compare.report import words
from graftune.compare.report.charts import Series, line_chart
from graftune.compare.report.disagreements import disagreements
from graftune.compare.report.report import fill
from graftune.compare.report.report import write_page as write
from graftune.compare.report.scatter import Point, scatter
from graftune.compare.report.view import Chart, RunView, points, run_view

if TYPE_CHECKING:
    from graftune.compare.outcome import Comparison, MemberOutcome

COLUMNS = (
    *("method", "mean", "95 % interval", "each seed", "p", "trained", "of the base"),
    *("own peak memory", "training", "on disk", "learning rate"),
)


@dataclass(frozen=True)
class Cell:
    """A table's cell: its text, and what it is sorted by."""

    text: str
    value: Any = ""


@dataclass(frozen=True)
class Member:
    """One method's part of the page."""

    label: str
    said: str
    view: RunView | None
    """Its first seed's run."""


def write_page(found: Comparison, path: str | os.PathLike[str]) -> Path:
    """Writes the page, one HTML file that needs nothing else, and returns its path."""
    return write(render(found), path)


def render(found: Comparison) -> str:
    """Returns the page's HTML."""
    from graftune.compare.recommendation import recommendation, verdict

    told = json.dumps(found.to_dict(), indent=1, ensure_ascii=False, default=str)
    return fill(
        "methods.html.j2",
        verdict=verdict(found),
        recommendation=list(recommendation(found))[1:],
        protocol=protocol(found),
        columns=COLUMNS,
        rows=rows(found),
        as_good=found.as_good,
        legend=[(label, index) for index, label in enumerate(_numbers(found))],
        charts=charts(found),
        curves=curves(found),
        heat_maps=_heat_maps(found),
        disagreements=disagreements({m.label: m.done[0].answers for m in found.members if m.done}),
        members=[_member(found, one) for one in found.members],
        settings=words.flatten(found.settings.to_dict()),
        command=f"graftune compare {found.settings.folder / 'compare.yaml'}",
        json=base64.b64encode(told.encode()).decode(),
        csv=base64.b64encode(csv(found).encode()).decode(),
    )


def protocol(found: Comparison) -> str:
    """Returns how the methods were compared, in sentences."""
    settings = found.settings
    tried = len(settings.search)
    chosen = (
        f"Each method's learning rate is the best of {tried} on the validation rows "
        f"({', '.join(f'{one:g}' for one in settings.search)} times its own, each for "
        f"{words.percent(settings.trial, 0)} of the steps, first seed). "
        if tried > 1
        else "Each method has its own learning rate; none was searched. "
    )
    seeds = f"Seeds: {', '.join(map(str, settings.seeds))}"
    return (
        f"Budget: {settings.budget}. {chosen}{seeds}; what draws nothing has one run. "
        f"{found.rows:,} {found.split} rows, on which nothing was chosen. Intervals are Student's "
        "over seeds (of a single run Wilson's over rows); p is of a sign-flip test over the same "
        "rows against the best, Holm-corrected. Memory is what a run itself added to its process "
        "at most."
    )


def rows(found: Comparison) -> list[list[Cell]]:
    """Returns the table, the best method first, those without a result last."""
    order = [one.label for one in found.standings]
    rest = [one.label for one in found.members if one.label not in order]
    return [_row(found, found.member(label)) for label in [*order, *rest]]


def charts(found: Comparison) -> list[Chart]:
    """Returns quality against each cost, and against the multiples of the learning rate."""
    drawn = [
        _against(found, "Trained parameters", lambda one: one.parameters, words.number),
        _against(found, "Own peak memory", lambda one: one.memory, words.size),
        _against(found, "Training time", lambda one: one.seconds, words.duration),
        _against(found, "Adapter on disk", lambda one: one.disk, words.size),
        _rates(found),
    ]
    return [chart for chart in drawn if chart is not None]


def curves(found: Comparison) -> list[Chart]:
    """Returns the first seeds' curves: the metric and the loss on validation rows, and the loss."""
    keys = [f"eval_{found.metric}", "eval_loss", "loss"]
    titles = {
        f"eval_{found.metric}": f"Validation {words.metric_name(found.metric)}",
        "eval_loss": "Validation loss",
        "loss": "Training loss",
    }
    drawn = [_curve(found, key, titles[key]) for key in dict.fromkeys(keys)]
    return [chart for chart in drawn if chart is not None]


def csv(found: Comparison) -> str:
    """Returns a line for each run that is done, with plain numbers."""
    head = ["method", "seed", found.metric, "trained", "memory_bytes", "seconds", "lr", "run_dir"]
    lines: list[list[str]] = [head]
    for member in found.members:
        values = member.values(found.metric)
        for value, one in zip(values, member.done, strict=False):
            cells = [
                member.label, one.seed, value, one.result["parameters"].get("trainable"),
                one.memory_bytes, one.seconds, one.lr, one.result["run_dir"],
            ]  # fmt: skip
            lines.append(["" if cell is None else str(cell) for cell in cells])
    return "".join(",".join(_quoted(cell) for cell in line) + "\n" for line in lines)


def _quoted(cell: str) -> str:
    return '"' + cell.replace('"', '""') + '"' if any(c in cell for c in ',"\n') else cell


def _row(found: Comparison, member: MemberOutcome) -> list[Cell]:
    standing = next((one for one in found.standings if one.label == member.label), None)
    if standing is None:
        return [Cell(member.label), Cell(f"{member.status}: {member.why}"), *_blank(9)]

    def shown(value: float | None) -> str:
        return words.metric_value(found.metric, value)

    inside, values = standing.interval, member.values(found.metric)
    ends = "–" if inside.low is None else f"{shown(inside.low)} – {shown(inside.high)}"
    share = member.done[0].result["parameters"].get("share")
    return [
        Cell(member.label),
        Cell(shown(inside.mean), inside.mean),
        Cell(ends, inside.low if inside.low is not None else -1),
        Cell(", ".join(map(shown, values))),
        Cell("–" if standing.p is None else f"{standing.p:.3g}", standing.p or 0),
        Cell(words.number(member.parameters), member.parameters or 0),
        Cell(words.percent(share), share or 0),
        Cell(words.size(member.memory), member.memory or 0),
        Cell(words.duration(member.seconds), member.seconds or 0),
        Cell(words.size(member.disk or None), member.disk or 0),
        Cell("–" if member.rate is None else f"{member.rate:g}", member.rate or 0),
    ]


def _blank(count: int) -> list[Cell]:
    return [Cell("–", -1)] * count


def _numbers(found: Comparison) -> dict[str, int]:
    """Returns each measured method's number in the drawings, the best first."""
    return {one.label: index for index, one in enumerate(found.standings, 1)}


def _against(
    found: Comparison,
    title: str,
    cost: Callable[[MemberOutcome], float | None],
    x_format: Callable[[float], str],
) -> Chart | None:
    drawn = [
        Point(
            one.label,
            number,
            value,
            one.interval.mean,
            one.interval.low,
            one.interval.high,
        )
        for number, one in enumerate(found.standings, 1)
        if (value := cost(found.member(one.label))) is not None
    ]
    if not drawn:
        return None
    name = words.metric_name(found.metric)
    svg = scatter(
        f"{name} against {title.lower()}",
        drawn,
        x_label=title.lower(),
        x_format=x_format,
        y_format=lambda value: words.metric_value(found.metric, value),
        is_falling=found.metric in words.LOWER_IS_BETTER,
    )
    return Chart(f"{name.capitalize()} against {title.lower()}", svg)


def _rates(found: Comparison) -> Chart | None:
    key = found.settings.train.metric or found.metric
    numbers = _numbers(found)
    series = [
        Series(member.label, line, numbers.get(member.label, 1) - 1, is_marked=True)
        for member in found.members
        if len(line := _rate_line(member, key)) > 1
    ]
    if not series:
        return None
    title = f"Validation {words.metric_name(key)} by learning rate"
    svg = line_chart(
        title,
        [dataclasses.replace(one, colour=one.colour % 8) for one in series],
        x_label="times the method's own",
        y_format=lambda value: words.metric_value(key, value),
        is_log=True,
    )
    return Chart(title, svg, note="From the trials, which are shorter than the runs.")


def _rate_line(member: MemberOutcome, key: str) -> tuple[tuple[float, float], ...]:
    found = [
        (one.multiple, one.result["metrics"].get("validation", {}).get(key))
        for one in member.trials
        if one.is_done and one.multiple is not None
    ]
    return tuple(sorted((x, y) for x, y in found if y is not None))


def _curve(found: Comparison, key: str, title: str) -> Chart | None:
    series = [
        Series(label, line, (number - 1) % 8, is_marked=len(line) <= 40)
        for label, number in _numbers(found).items()
        if (line := points(found.member(label).done[0].result, key))
    ]
    if not series:
        return None
    svg = line_chart(f"{title} by step", series, x_label="step")
    return Chart(title, svg, tuple((one.name, one.colour) for one in series))


def _heat_maps(found: Comparison) -> list[Chart]:
    from graftune.compare.report.heatmap import heat_map

    return [
        Chart(f"{member.label}: {one['title']}", svg, note=str(one.get("note") or ""))
        for member in found.members
        for one in (member.done[0].result.get("heat_maps") or () if member.done else ())
        if (svg := heat_map(one))
    ]


def _member(found: Comparison, member: MemberOutcome) -> Member:
    if not member.done:
        return Member(member.label, f"{member.status}: {member.why}", None)
    first = member.done[0]
    parameters = {**first.result["parameters"], "sites": []}
    run = {**first.result, "parameters": parameters, "heat_maps": [], "name": member.label}
    view = run_view({**run, "predictions": first.answers})
    if member.kind == "probe":
        folder = found.settings.folder
        command = f"graftune compare {folder / 'compare.yaml'} --method probe --out {folder}-again"
        view = dataclasses.replace(view, command=command)
    said = view.verdict if len(member.runs) == 1 else f"{view.verdict} (seed {first.seed})"
    return Member(member.label, said, view)
