"""Several runs on one page: a table, bars, and their curves over the same axes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from graftune.compare.report import words
from graftune.compare.report.charts import Bar, Series, bar_chart, line_chart
from graftune.compare.report.view import (
    Chart,
    Run,
    main_metric,
    margin,
    points,
    rows_tested,
    run_name,
    scores_of,
    split_of,
    trained_share,
)
from graftune.tasks.prompt_costs import per_prediction


@dataclass(frozen=True)
class Comparison:
    """What the page shows above the single runs."""

    verdict: str
    columns: list[str]
    rows: list[list[str]]
    best: int
    charts: list[Chart]
    note: str


def compare(runs: Sequence[Run]) -> Comparison:
    """Returns the comparison of two or more runs, in the order given."""
    best = best_of(runs)
    columns, rows = _table(runs)
    charts = [_metric_bars(runs), _size_bars(runs), _curves(runs, "eval_loss", "Validation loss")]
    charts += [_curves(runs, "loss", "Training loss")]
    return Comparison(
        verdict=_verdict(runs, best),
        columns=columns,
        rows=rows,
        best=best,
        charts=[chart for chart in charts if chart is not None],
        note=_note(runs),
    )


def best_of(runs: Sequence[Run]) -> int:
    """Returns the index of the run with the best main metric (the earlier one of equals)."""
    scored = [(index, main_metric(run)) for index, run in enumerate(runs)]
    known = [(index, main[0], main[1]) for index, main in scored if main is not None]
    if not known:
        return 0
    lower = known[0][1] in words.LOWER_IS_BETTER
    return max(known, key=lambda one: (-one[2] if lower else one[2], -one[0]))[0]


def _verdict(runs: Sequence[Run], best: int) -> str:
    main = main_metric(runs[best])
    if main is None:
        return f"{len(runs)} runs, none measured on held-out rows"
    key = main[0]
    parts = [f"{run_name(runs[best])} is best: {_score(runs[best], key)} {words.metric_name(key)}"]
    others = [run for index, run in enumerate(runs) if index != best]
    parts += [f"{run_name(run)} {_score(run, key)}" for run in others]
    share = trained_share(runs[best])
    tail = f"; it trained {words.percent(share)} of the parameters" if share else ""
    return ", ".join(parts) + tail


def _score(run: Run, key: str) -> str:
    return words.metric_value(key, scores_of(run).get(key))


def _table(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    wanted = [*words.MAIN_METRICS[:3], "macro_f1", "mcc", "perplexity", "loss"]
    keys = [key for key in wanted if any(key in scores_of(run) for run in runs)]
    columns = ["method", *(words.metric_name(key) for key in keys)]
    timed = any(per_prediction(run.get("costs") or {}) is not None for run in runs)
    columns += ["trained", "share", "on disk", "time", "peak memory"]
    columns += ["a prediction"] if timed else []
    rows = [
        [
            run_name(run),
            *(_score(run, key) for key in keys),
            words.number((run.get("parameters") or {}).get("trainable")),
            words.percent(trained_share(run)),
            words.size(run.get("adapter_bytes") or None),
            words.duration(run.get("seconds")),
            words.size(run.get("peak_memory_bytes")),
            *([words.moment(per_prediction(run.get("costs") or {}))] if timed else []),
        ]
        for run in runs
    ]
    return columns, rows


def _metric_bars(runs: Sequence[Run]) -> Chart | None:
    main = next((found for run in runs if (found := main_metric(run))), None)
    if main is None:
        return None
    key = main[0]
    bars: list[Bar] = []
    for index, run in enumerate(runs):
        value = scores_of(run).get(key)
        if value is None:
            continue
        rows = rows_tested(run) if key == "accuracy" else 0
        low, high = margin(value, rows) if rows else (None, None)
        bars.append(Bar(run_name(run), value, _score(run, key), index, low, high))
    most = 1.0 if key in words.SHARES else None
    title = words.metric_name(key).capitalize()
    note = "Whiskers: 95 % interval of a share measured on this many rows." if bars[0].high else ""
    return Chart(title, bar_chart(f"{title} by run", bars, most=most), note=note)


def _size_bars(runs: Sequence[Run]) -> Chart | None:
    bars = [
        Bar(run_name(run), float(run["adapter_bytes"]), words.size(run["adapter_bytes"]), index)
        for index, run in enumerate(runs)
        if run.get("adapter_bytes")
    ]
    base = next((float(run["base_bytes"]) for run in runs if run.get("base_bytes")), None)
    if base:
        bars.append(Bar("the base model's weights", base, words.size(base), 7))
    return Chart("What a run keeps on disk", bar_chart("Bytes on disk", bars)) if bars else None


def _curves(runs: Sequence[Run], key: str, title: str) -> Chart | None:
    series = [
        Series(run_name(run), found, index, is_marked=len(found) <= 40)
        for index, run in enumerate(runs)
        if (found := points(run, key))
    ]
    if not series:
        return None
    svg = line_chart(f"{title} by step", series, x_label="step")
    return Chart(title, svg, tuple((one.name, one.colour) for one in series))


def _note(runs: Sequence[Run]) -> str:
    tested = {rows_tested(run) for run in runs}
    if len(tested) == 1 and (rows := tested.pop()):
        split = split_of(runs[0])
        return f"All measured on the same {rows:,} {split} rows, on which none was trained."
    return ""
