"""What to choose, in sentences: what is as good as the best, what of it is cheapest in what."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from graftune.compare.outcome import Comparison, MemberOutcome
from graftune.compare.report import words
from graftune.compare.statistics import Standing

FEW_ROWS = 200
"""Test rows below which differences of some points can't be seen."""

_COSTS: tuple[tuple[str, Callable[[MemberOutcome], float | None], Callable[..., str]], ...] = (
    ("the fewest trained parameters", lambda one: one.parameters, words.number),
    ("the least memory", lambda one: one.memory, words.size),
    ("the least training time", lambda one: one.seconds, words.duration),
)


def recommendation(found: Comparison) -> list[str]:
    """Returns the recommendation, a sentence each: the verdict, the choice, what isn't known."""
    if not found.standings:
        return ["No method was measured on held-out rows, so none can be recommended."]
    return [f"{verdict(found)}.", *choice(found), *limits(found), *unknown(found)]


def verdict(found: Comparison) -> str:
    """Returns one sentence: which method is best, or which can't be told apart."""
    if not found.standings:
        return "No method was measured on held-out rows"
    best = found.standings[0]
    if len(found.standings) == 1:
        return f"{best.label} alone was measured: {said(best, found.metric)}"
    if found.winner is not None:
        second = found.standings[1]
        return (
            f"{best.label} is best: {said(best, found.metric)}, before {second.label} with "
            f"{said(second, found.metric)}"
        )
    others = [
        f"{one.label} ({words.metric_value(found.metric, one.interval.mean)})"
        for one in found.standings[1:]
        if one.is_as_good
    ]
    return (
        f"No single best: {best.label} comes to {said(best, found.metric)}, and "
        f"{_listed(others)} can't be told from it"
    )


def said(standing: Standing, metric: str) -> str:
    """Returns a metric's mean with its interval, in words."""
    mean = words.metric_value(metric, standing.interval.mean)
    name = words.metric_name(metric)
    low, high = standing.interval.low, standing.interval.high
    if low is None or high is None:
        return f"{mean} {name}"
    ends = [words.metric_value(metric, end) for end in (low, high)]
    return f"{mean} {name} ({ends[0].removesuffix(' %')}–{ends[1]})"


def choice(found: Comparison) -> list[str]:
    """Returns which of the methods that can't be told from the best is cheapest, and in what."""
    good = [found.member(label) for label in found.as_good]
    if len(good) < 2:
        return []
    cheapest: dict[str, list[str]] = {}
    for what, cost, told in _COSTS:
        known = [(value, one.label) for one in good if (value := cost(one)) is not None]
        if known:
            value, label = min(known)
            cheapest.setdefault(label, []).append(f"{what} ({told(value)})")
    parts = [f"{label} takes {_listed(whats)}" for label, whats in cheapest.items()]
    if len(cheapest) == 1:
        label = next(iter(cheapest))
        return [f"Of those that can't be told apart, choose {label}: it takes "
                f"{_listed(cheapest[label])}."]  # fmt: skip
    return [
        f"Of those that can't be told apart, {'; '.join(parts)}: choose by what you are short of."
    ]


def limits(found: Comparison) -> list[str]:
    """Returns what the budget left out, and what failed."""
    told = [
        f"{one.label} was left out: {one.why}." for one in found.members if one.status == "left out"
    ]
    for one in found.members:
        if one.status == "failed":
            part = f", {len(one.done)} of {len(one.runs)} seeds count" if one.done else ""
            told.append(f"{one.label} failed{part}: {one.why.rstrip('.')}.")
    return told


def unknown(found: Comparison) -> list[str]:
    """Returns what the comparison can't tell."""
    told: list[str] = []
    if len(found.settings.seeds) == 1:
        told.append("With one seed it isn't known how much another would change the figures.")
    elif len(found.settings.seeds) == 2:
        told.append(
            "Two seeds make intervals very wide, 9 standard deviations to either side and not the "
            "2.5 of three; three or more tell methods better apart."
        )
    if found.rows < FEW_ROWS:
        told.append(
            f"{found.rows} {found.split} rows are few: one row more or less is "
            f"{words.percent(1 / max(found.rows, 1))}."
        )
    if all(one.p is None for one in found.standings[1:]) and len(found.standings) > 1:
        told.append("It isn't known how well each row was answered, so no test over rows was made.")
    return told


def _listed(names: Sequence[str]) -> str:
    if len(names) < 2:
        return "".join(names)
    return f"{', '.join(names[:-1])} and {names[-1]}"
