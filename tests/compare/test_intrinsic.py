"""The search for the intrinsic dimension: what it finds, keeps, draws and refuses."""

from __future__ import annotations

import dataclasses

import pytest

from graftune.compare.intrinsic import Dimension, Point
from graftune.compare.report.intrinsic import curve, rows, verdict, write_page


def found(*values: float, reference: float = 0.8, share: float = 0.9) -> Dimension:
    points = [
        Point(10 ** (at + 1), 0.01, value, 60.0, f"runs/d{at}") for at, value in enumerate(values)
    ]
    return Dimension("accuracy", share, reference, "runs/full", tuple(points))


def test_the_smallest_d_at_the_bar_or_above_is_it() -> None:
    assert found(0.5, 0.72, 0.9).found == 100
    assert found(0.5, 0.719, 0.9).found == 1000
    assert found(0.5, 0.6).found is None
    assert found(0.5, 0.6, share=0.5).found == 10
    assert found(0.5).bar == pytest.approx(0.72)


def test_the_verdict_says_what_was_found_or_how_far_it_came() -> None:
    assert verdict(found(0.5, 0.75)).startswith("d90 is 100: the smallest d tried with at least")
    assert "72.0 % accuracy, 90% of full fine-tuning's 80.0 %" in verdict(found(0.5, 0.75))
    assert verdict(found(0.75)).startswith("d90 is at most 10")
    told = verdict(found(0.5, 0.6))
    assert told.startswith("d90 lies above 100")
    assert "60.0 % accuracy at d = 100" in told
    assert verdict(found(0.7, share=0.85)).startswith("d85 is at most")


def test_the_page_draws_the_curve_the_bar_and_the_point(tmp_path) -> None:
    page = write_page(found(0.5, 0.75, 0.79), tmp_path / "report.html").read_text()
    assert page.count("<circle") == 3
    assert page.count('class="dot best') == 1
    assert "90% of full" in page
    assert '<tr class="winner"><td class="n">100</td>' in page
    assert "runs/full" in page
    assert "http" not in page.replace("http-equiv", "")
    given = dataclasses.replace(found(0.5), reference_from="")
    assert "was given, not trained" in write_page(given, tmp_path / "b.html").read_text()


def test_equal_factors_of_d_are_equally_far_apart() -> None:
    drawn = str(curve(found(0.1, 0.2, 0.3)))
    places = [float(part.split('"')[1]) for part in drawn.split("<circle")[1:]
              for part in [part[part.index("cx="):]]]  # fmt: skip
    assert places[1] - places[0] == pytest.approx(places[2] - places[1], abs=0.2)


def test_one_point_alone_can_be_drawn() -> None:
    assert "<circle" in str(curve(found(0.5)))
    assert rows(found(0.4))[0] == ["10", "40.0 %", "50.0 %", "0.01", "1 min 0 s"]
