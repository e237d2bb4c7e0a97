"""`graftune train --method auto`: what it says, what it writes, and what goes on from there."""

from __future__ import annotations

import pytest

from graftune.tasks.settings import RunSettings

BY = "Ben Zaken et al. 2021"


@pytest.fixture
def words(base, rows, tmp_path):
    return ["train", "--base", base, "--data", rows, "--out", tmp_path / "out", "--method", "auto"]


def test_a_dry_run_shows_the_choice_with_its_reasons_and_writes_nothing(
    graftune, words, tmp_path
) -> None:
    ended = graftune(*words, "--dry-run")
    assert ended.code == 0, ended.err
    assert "name: BitFit" in ended.out
    assert "name: auto" not in ended.out
    assert BY in ended.out
    told = graftune(*words, "--dry-run", "--json", "--memory", "1GiB").json
    assert told["settings"]["method"] == {"name": "BitFit"}
    assert "of 1.00 GiB as planned" in told["reasons"][-1]
    assert not (tmp_path / "out").exists()


def test_a_run_says_why_and_holds_the_choice_which_resuming_keeps(
    graftune, words, tmp_path
) -> None:
    ended = graftune(*words, "--steps", 2, "--no-report")
    assert ended.code == 0, ended.err
    assert BY in ended.err
    assert "20 passes" not in ended.err
    kept = RunSettings.from_yaml(tmp_path / "out" / "run.yaml")
    assert (kept.method, kept.train.steps) == ({"name": "BitFit"}, 2)
    again = graftune(*words, "--steps", 2, "--no-report", "--resume", "--memory", "2KiB", "--json")
    assert again.code == 0, again.err
    assert BY not in again.err
    assert again.json["settings"]["method"] == {"name": "BitFit"}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--memory", "2KiB"], "doesn't fit"),
        (["--r", 4], "method.r: auto chooses"),
        (["--method", "lora", "--memory", "1GiB"], "--memory goes with --method auto"),
    ],
)
def test_what_cannot_be_is_one_sentence_and_leaves_nothing(
    graftune, words, tmp_path, more, said
) -> None:
    ended = graftune(*words, *more)
    assert ended.code == 2, ended.out
    assert said in ended.err
    assert "Traceback" not in ended.err
    assert not (tmp_path / "out").exists()


def test_other_commands_say_where_auto_can_be_asked(graftune, base, rows, tmp_path) -> None:
    ended = graftune(
        "compare", "--base", base, "--data", rows, "--method", "auto", "--out", tmp_path
    )
    assert ended.code == 2
    assert "graftune train --method auto" in ended.err
