"""How sure a difference between methods is: intervals over seeds, a test over rows.

interval   mean ± t₀.₉₇₅(n − 1) · s / √n over n seeds (Student 1908); of one run with right and
           wrong rows, Wilson's for a share
test       rows' scores, each the mean over a method's seeds, with the signs of the differences
           to the best method flipped at random (Fisher's randomisation test, two-sided); 1 where
           the rows favour the other, which a metric that is no mean over rows allows
several    Holm's correction: the k-th smallest of m values counts (m − k + 1)-fold
best       named alone only if the others' intervals lie apart from its own and the test says
           that they differ; else all that can't be told from it are as good
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.05
FLIPS = 10_000
_CHUNK = 500


@dataclass(frozen=True)
class Interval:
    """A mean and the ends of its 95 % interval; None where nothing is known of the spread."""

    mean: float
    low: float | None
    high: float | None
    of: str
    """What it is over: "seeds", "rows", or "" without one."""

    def overlaps(self, other: Interval) -> bool:
        """Whether both may be the same; True where one has no ends."""
        if self.low is None or self.high is None or other.low is None or other.high is None:
            return True
        return self.low <= other.high and other.low <= self.high


@dataclass(frozen=True)
class Standing:
    """Where a method stands beside the best one."""

    label: str
    interval: Interval
    p: float | None
    """That the best is no better, Holm-corrected; None where it can't be tested."""
    is_as_good: bool
    """Whether it can't be told from the best."""


def interval(values: Sequence[float], rows: int = 0, *, is_share: bool = False) -> Interval:
    """Returns the mean of seeds' values with its 95 % interval.

    Args:
        values: One for each seed.
        rows: That the only value is a share of; 0 where it is none.
        is_share: Whether no value is below 0 or above 1.

    Example:
        >>> found = interval([0.90, 0.92, 0.94])
        >>> round(found.low, 4), round(found.mean, 4), round(found.high, 4)
        (0.8703, 0.92, 0.9697)
    """
    mean = float(np.mean(values))
    if len(values) > 1:
        half = float(stats.t.ppf(1 - LEVEL / 2, len(values) - 1)) * float(np.std(values, ddof=1))
        half /= math.sqrt(len(values))
        low, high = mean - half, mean + half
        return Interval(mean, *((max(low, 0), min(high, 1)) if is_share else (low, high)), "seeds")
    if rows:
        found = stats.binomtest(round(mean * rows), rows).proportion_ci(method="wilson")
        return Interval(mean, float(found.low), float(found.high), "rows")
    return Interval(mean, None, None, "")


def sign_flip(first: Sequence[float], second: Sequence[float], seed: int = 0) -> float:
    """Returns how often random signs make as large a mean difference of paired scores.

    All signs are tried where there are few rows that differ, `FLIPS` draws of them otherwise.

    Example:
        >>> sign_flip([1, 1, 1, 1], [0, 0, 0, 0]), sign_flip([1, 0], [1, 0])
        (0.125, 1.0)
    """
    differences = np.asarray(first, float) - np.asarray(second, float)
    differences = differences[differences != 0]
    if not len(differences):
        return 1.0
    seen = abs(differences.sum()) - 1e-9
    if 2 ** len(differences) <= FLIPS:
        patterns = np.arange(2 ** len(differences))[:, None] >> np.arange(len(differences))
        return float(np.mean(np.abs((1 - 2 * (patterns & 1)) @ differences) >= seen))
    rng, more = np.random.default_rng(seed), 0
    for _ in range(FLIPS // _CHUNK):
        signs = rng.integers(0, 2, (_CHUNK, len(differences)), dtype=np.int8) * 2 - 1
        more += int((np.abs(signs @ differences) >= seen).sum())
    return (more + 1) / (FLIPS + 1)


def holm(values: Sequence[float]) -> list[float]:
    """Returns p values corrected for their number.

    Source: Holm 1979, "A simple sequentially rejective multiple test procedure".

    Example:
        >>> [round(p, 4) for p in holm([0.01, 0.04, 0.03])]
        [0.03, 0.06, 0.06]
    """
    order = np.argsort(values, kind="stable")
    found, most = [0.0] * len(values), 0.0
    for place, index in enumerate(order):
        most = max(most, min(1.0, (len(values) - place) * values[index]))
        found[index] = most
    return found


def standings(
    values: Mapping[str, Sequence[float]],
    scores: Mapping[str, Sequence[Sequence[float]]],
    *,
    is_falling: bool = False,
    is_share: bool = False,
    is_of_rows: bool = False,
) -> list[Standing]:
    """Returns how methods stand, the best first.

    Args:
        values: Each method's metric, one for each seed.
        scores: How well each test row was answered, for each seed, more is better (1 and 0 for
            right and wrong); [] where that isn't known.
        is_falling: Whether less is better.
        is_share: Whether the metric lies between 0 and 1.
        is_of_rows: Whether it is the share of right rows.
    """
    if not values:
        return []
    means = {label: _row_means(scores.get(label, ())) for label in values}
    intervals = {
        label: interval(found, len(means[label]) if is_of_rows else 0, is_share=is_share)
        for label, found in values.items()
    }
    sign = 1 if is_falling else -1
    order = sorted(values, key=lambda label: sign * intervals[label].mean)
    best, others = order[0], order[1:]
    tested = _tests(best, others, means)
    found = [Standing(best, intervals[best], None, True)]
    for label in others:
        p = tested.get(label)
        apart = not intervals[label].overlaps(intervals[best])
        found.append(Standing(label, intervals[label], p, not apart or (p or 0.0) >= LEVEL))
    return found


def _tests(
    best: str, others: Sequence[str], means: Mapping[str, Sequence[float]]
) -> dict[str, float]:
    fit = [label for label in others if means[label] and len(means[label]) == len(means[best])]
    return dict(zip(fit, holm([_test(means[best], means[one]) for one in fit]), strict=True))


def _test(best: Sequence[float], other: Sequence[float]) -> float:
    """Returns the p of a difference; 1 where the rows say that the other one is better."""
    return sign_flip(best, other) if sum(best) > sum(other) else 1.0


def _row_means(scores: Sequence[Sequence[float]]) -> list[float]:
    """Returns each row's mean over the seeds."""
    known = [one for one in scores if one]
    if not known or len({len(one) for one in known}) > 1:
        return []
    return [float(x) for x in np.mean(np.asarray(known, float), axis=0)]
