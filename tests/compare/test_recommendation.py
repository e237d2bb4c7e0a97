"""What a comparison recommends, and what it says it doesn't know."""

from __future__ import annotations

from pathlib import Path

from graftune.compare.recommendation import recommendation
from tests.compare.comparing import comparison


def test_the_tied_are_named_with_what_is_cheapest_in_what(tmp_path: Path) -> None:
    found = comparison(tmp_path)
    told = recommendation(found)
    assert found.winner is None
    assert found.as_good[0] == "full"
    assert "probe" not in found.as_good
    assert told[0].startswith("No single best: full comes to")
    assert "LoRA (" in told[0]
    cheapest = "BitFit" if "BitFit" in found.as_good else "LoRA"
    assert f"choose {cheapest}: it takes the fewest trained parameters" in told[1]
    assert "the least memory" in told[1]
    assert "the least training time" in told[1]


def test_what_failed_and_what_was_left_out_is_said(tmp_path: Path) -> None:
    told = " ".join(recommendation(comparison(tmp_path)))
    assert "lost failed: its process was ended by SIGKILL." in told
    assert "big was left out: its process was ended by SIGKILL." in told


def test_a_winner_needs_no_choice(tmp_path: Path) -> None:
    found = comparison(tmp_path, {"probe": (0.5,), "full": (0.92, 0.925, 0.93)})
    assert found.winner == "full"
    told = recommendation(found)
    assert told[0].startswith("full is best: ")
    assert "before probe with" in told[0]
    assert not any("choose" in one for one in told)


def test_one_seed_and_few_rows_are_said(tmp_path: Path) -> None:
    found = comparison(tmp_path, {"probe": (0.8,), "full": (0.9,)}, rows=50)
    settings = found.settings.model_copy(update={"seeds": (0,)})
    told = " ".join(recommendation(comparison(tmp_path, rows=50, settings=settings)))
    assert "With one seed it isn't known" in told
    assert "50 test rows are few: one row more or less is 2.0 %." in told


def test_two_seeds_are_said_to_tell_little(tmp_path: Path) -> None:
    found = comparison(tmp_path)
    settings = found.settings.model_copy(update={"seeds": (0, 1)})
    assert "Two seeds make intervals very wide" in " ".join(
        recommendation(comparison(tmp_path, settings=settings))
    )
    assert "Two seeds" not in " ".join(recommendation(found))


def test_nothing_measured_recommends_nothing(tmp_path: Path) -> None:
    found = comparison(tmp_path, {})
    assert recommendation(found) == [
        "No method was measured on held-out rows, so none can be recommended."
    ]
