"""`graftune compare`: flags, files, what it refuses, what it prints."""

from __future__ import annotations

import pytest


@pytest.fixture
def words(base, rows, tmp_path):
    return ["compare", "--base", base, "--data", rows, "--out", tmp_path / "out"]


def test_a_dry_run_says_what_would_be_run_and_runs_nothing(graftune, words, tmp_path) -> None:
    ended = graftune(
        *words, "--method", "probe,bitfit", "--method", "lora:r=2,targets=qv", "--seeds", 2,
        "--budget", "steps=9", "--search", "1,5", "--dry-run",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    assert "5, and 4 shorter trials before them" in ended.out
    assert "steps = 9" in ended.out
    assert not (tmp_path / "out").exists()
    told = graftune(*words, "--method", "lora:r=2", "--dry-run", "--search", "off", "--json").json
    assert told["settings"]["search"] == []
    assert told["methods"][0]["method"] == {"name": "lora", "r": 2}
    assert told["settings"]["seeds"] == [0, 1, 2]


def test_flags_change_a_file_and_its_errors_name_the_line(graftune, words, tmp_path) -> None:
    path = tmp_path / "compare.yaml"
    lines = [f"base: {words[2]}", f"data: {words[4]}", "methods: [bitfit]", "seeds: 1", "trail: 1"]
    path.write_text("\n".join(lines))
    ended = graftune("compare", path, "--dry-run")
    assert ended.code == 2
    assert f'{path}:5: trail: unknown key. Did you mean "trial"?' in ended.err
    path.write_text("\n".join(lines[:-1]))
    told = graftune("compare", path, "--dry-run", "--json", "--seeds", "4,5", "--set", "trial=0.5")
    assert told.json["settings"]["seeds"] == [4, 5]
    assert told.json["settings"]["trial"] == 0.5
    assert [one["label"] for one in told.json["methods"]] == ["bitfit"]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--method", "bitfitt"], 'Did you mean "BitFit"?'),
        (["--budget", "step=3"], '--budget: budget.step: unknown key. Did you mean "steps"?'),
        (["--budget", "200"], 'is not of the form key=value, as in steps=200'),
        (["--method", "lora:r"], 'expected key=value, found "r"'),
        (["--method", "lora:rank=3"], "methods, lora: "),
        (["--seeds", "two"], '--seeds takes whole numbers with commas between them, found "two"'),
        (["--set", "train.steps=3", "--budget", "steps=3"], "give one of the two"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_any_work(graftune, words, tmp_path, flags, told) -> None:
    ended = graftune(*words, *flags)
    assert ended.code == 2, ended.out
    assert told in ended.err
    assert not (tmp_path / "out").exists()


def test_base_and_data_are_asked_for(graftune) -> None:
    ended = graftune("compare")
    assert ended.code == 2
    assert "graftune compare needs a base model and data" in ended.err


def test_it_prints_a_line_for_each_run_a_table_and_a_recommendation(
    graftune, words, tmp_path
) -> None:
    given = [*words, "--method", "probe", "--seeds", 1]
    ended = graftune(*given)
    assert ended.code == 0, ended.err
    assert "[1/1] probe: " in ended.err
    assert "probe alone was measured" in ended.out
    assert str(tmp_path / "out" / "report.html") in ended.out
    again = graftune(*given, "--json", "--quiet")
    assert again.err == ""
    assert again.json["methods"][0]["status"] == "done"
    assert again.json["standings"][0]["label"] == "probe"


def test_the_live_table_shows_trials_runs_and_what_is_left(capsys) -> None:
    from rich.console import Console

    from graftune.cli.compare_progress import Table
    from graftune.compare.members import Cell, Member
    from graftune.compare.results import Record
    from graftune.tasks.settings import RunSettings

    member = Member("LoRA", "lora", "adapter", {"name": "lora"}, {}, (0, 1))
    told = RunSettings(base="b", data="d", train={"lr": 0.1})
    table = Table()
    table.on_plan(["LoRA"], 3)
    trial, whole = Cell(member, 0, told, 1.0), Cell(member, 0, told)
    table.on_run(trial)
    table.on_end(trial, Record(key="a", label="LoRA", seed=0, status="done"), is_new=True)
    metrics = {"test": {"accuracy": 0.9}}
    done = Record(key="b", label="LoRA", seed=0, status="done", result={"metrics": metrics})
    table.on_run(whole)
    table.on_news(whole, "step", {"step": 5, "total": 10, "seconds_left": 7.0})
    console = Console(width=100)
    with console.capture() as caught:
        console.print(table._drawn())
    assert "50%  left 7.0 s" in caught.get()
    table.on_end(whole, done, is_new=True)
    with console.capture() as caught:
        console.print(table._drawn())
    table.close()
    assert "·" in caught.get()
    assert "90.0 % accuracy" in caught.get()
    assert "2 of 3, left" in caught.get()
