"""How sure a difference is: against scipy, by hand, and on made-up methods."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from graftune.compare.statistics import holm, interval, sign_flip, standings


def test_the_interval_over_seeds_is_students() -> None:
    values = [0.81, 0.84, 0.8, 0.86]
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    found = interval(values)
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))
    assert found.of == "seeds"


def test_a_share_has_no_interval_beyond_0_and_1() -> None:
    found = interval([0.7, 1.0], is_share=True)
    assert (found.low, found.high) == (0, 1)


def test_one_run_has_wilsons_interval_over_its_rows_or_none() -> None:
    found = interval([0.9], 100)
    assert (round(found.low or 0, 3), round(found.high or 0, 3)) == (0.826, 0.945)
    assert interval([0.9]).low is None


def test_the_sign_flip_test_is_scipys_permutation_test() -> None:
    rng = np.random.default_rng(3)
    first, second = rng.random(12) + 0.25, rng.random(12)
    exact = stats.permutation_test(
        (first, second), lambda a, b: np.mean(a - b), permutation_type="samples", n_resamples=np.inf
    )
    assert sign_flip(list(first), list(second)) == pytest.approx(exact.pvalue)
    rights = rng.random((2, 400)) < [[0.8], [0.7]]
    drawn = sign_flip(list(rights[0]), list(rights[1]))
    discordant = (rights[0] & ~rights[1]).sum(), (rights[1] & ~rights[0]).sum()
    mcnemar = stats.binomtest(int(discordant[0]), int(sum(discordant))).pvalue
    assert drawn == pytest.approx(mcnemar, abs=0.02)
    assert drawn == sign_flip(list(rights[0]), list(rights[1]))


def test_holms_correction_never_falls_and_never_exceeds_1() -> None:
    assert holm([0.01, 0.02, 0.5]) == pytest.approx([0.03, 0.04, 0.5])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def rows(right: int, total: int = 400) -> list[bool]:
    return [index < right for index in range(total)]


def test_a_winner_is_named_where_intervals_lie_apart_and_rows_differ() -> None:
    values = {"worse": [0.80, 0.81, 0.80], "better": [0.90, 0.91, 0.90]}
    rights = {"worse": [rows(320)] * 3, "better": [rows(360)] * 3}
    best, other = standings(values, rights)
    assert (best.label, other.label, other.is_as_good) == ("better", "worse", False)
    assert other.p is not None
    assert other.p < 0.05


def test_no_winner_where_intervals_overlap() -> None:
    values = {"a": [0.90, 0.80, 0.85], "b": [0.91, 0.83, 0.87]}
    rights = {"a": [rows(340)] * 3, "b": [rows(348)] * 3}
    assert [one.is_as_good for one in standings(values, rights)] == [True, True]


def test_no_winner_where_the_same_rows_say_nothing() -> None:
    values = {"a": [0.850, 0.851, 0.850], "b": [0.855, 0.856, 0.855]}
    rights = {"a": [rows(340)] * 3, "b": [rows(342)] * 3}
    best, other = standings(values, rights)
    assert not best.interval.overlaps(other.interval)
    assert other.is_as_good
    assert other.p == pytest.approx(0.5)


def test_of_a_loss_the_least_is_best_and_one_seed_names_no_winner() -> None:
    found = standings({"a": [0.4], "b": [0.2]}, {}, is_falling=True)
    assert [one.label for one in found] == ["b", "a"]
    assert found[1].is_as_good
    assert found[1].p is None


def test_without_seeds_apart_rows_of_one_seed_can_name_a_winner() -> None:
    rights = {"a": [rows(200)], "b": [rows(380)]}
    found = standings({"a": [0.5], "b": [0.95]}, rights, is_of_rows=True)
    assert [one.is_as_good for one in found] == [True, False]


def test_rows_of_any_score_are_tested_and_a_difference_of_all_rows_is_seen() -> None:
    rng = np.random.default_rng(5)
    good = rng.random(60)
    scores = {"good": [list(good)] * 3, "bad": [list(good - 0.1)] * 3}
    values = {"good": [0.90, 0.91, 0.90], "bad": [0.80, 0.81, 0.80]}
    best, other = standings(values, scores)
    assert (best.label, other.is_as_good) == ("good", False)
    assert other.p == pytest.approx(1 / 10_001)


def test_rows_that_favour_the_other_name_no_winner() -> None:
    scores = {"a": [[0.1] * 60] * 3, "b": [[0.9] * 60] * 3}
    best, other = standings({"a": [0.90, 0.91, 0.90], "b": [0.80, 0.81, 0.80]}, scores)
    assert (best.label, other.label, other.p, other.is_as_good) == ("a", "b", 1.0, True)


def test_a_loss_counts_down_and_its_rows_up() -> None:
    scores = {"a": [[-2.0] * 60] * 3, "b": [[-1.0] * 60] * 3}
    values = {"a": [2.0, 2.1, 2.0], "b": [1.0, 1.1, 1.0]}
    best, other = standings(values, scores, is_falling=True)
    assert (best.label, other.is_as_good) == ("b", False)
