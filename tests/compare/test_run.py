"""A comparison: what it runs, survives, keeps, and goes on with."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from graftune.compare.members import Cell
from graftune.compare.outcome import Comparison
from graftune.compare.results import FILE, Record
from graftune.compare.run import plan, run
from graftune.compare.settings import CompareSettings
from graftune.compare.watching import Unwatched
from graftune.errors import DataError, FormatError, SettingsError
from tests.tasks import tiny


class Watch(Unwatched):
    """Notes what begins and ends, and may end the worker or the whole comparison."""

    def __init__(self, kill: str = "", stop: str = "") -> None:
        self.kill, self.stop = kill, stop
        self.begun: list[str] = []
        self.news: set[str] = set()
        self.ended: dict[str, tuple[Record, bool]] = {}

    def on_run(self, cell: Cell) -> None:
        self.begun.append(cell.title)

    def on_news(self, cell: Cell, kind: str, what: Any) -> None:
        self.news.add(kind)
        if cell.title == self.kill and kind == "start":
            for process in multiprocessing.active_children():
                os.kill(process.pid, signal.SIGKILL)

    def on_end(self, cell: Cell, record: Record, *, is_new: bool) -> None:
        self.ended[cell.title] = (record, is_new)
        if cell.title == self.stop:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("comparing")
    tiny.bert(folder / "base")
    tiny.write_jsonl(folder / "mail.jsonl", tiny.mail(60))
    return folder


def settings(place: Path, **more: Any) -> CompareSettings:
    told = {
        "base": str(place / "base"),
        "data": str(place / "mail.jsonl"),
        "methods": ["probe", "bitfit", {"name": "lora", "targets": "no_such"}, "ia3"],
        "seeds": [0],
        "budget": {"steps": 6},
        "search": [1, 10],
        "out": str(place / "out"),
    }
    return CompareSettings(**{**told, **more})


@pytest.fixture(scope="module")
def went(place: Path) -> tuple[Comparison, Watch, Watch, bytes]:
    """A comparison that is stopped, and goes on with a worker that is killed."""
    stopped = Watch(stop="bitfit, trying learning rate 0.001")
    with pytest.raises(KeyboardInterrupt):
        run(settings(place), watch=stopped)
    before = (place / "out" / FILE).read_bytes()
    watch = Watch(kill="ia3")
    return run(settings(place), watch=watch), stopped, watch, before


def test_what_is_finished_when_it_is_stopped_is_not_done_again(went: Any, place: Path) -> None:
    _, stopped, watch, before = went
    assert stopped.begun == ["probe", "bitfit, trying learning rate 0.001"]
    assert before.count(b"\n") == 2
    assert (place / "out" / FILE).read_bytes().startswith(before)
    assert watch.begun[0] == "bitfit, trying learning rate 0.01"
    assert not watch.ended["probe"][1]


def test_a_failing_member_and_a_killed_process_stop_nothing(went: Any) -> None:
    found = went[0]
    told = {one.label: (one.status, one.why) for one in found.members}
    assert told["probe"] == told["bitfit"] == ("done", "")
    assert told["lora"][0] == "failed"
    assert "no_such" in told["lora"][1]
    assert told["ia3"][0] == "failed"
    assert "ended by SIGKILL, as the system does when memory runs out" in told["ia3"][1]
    assert {one.label for one in found.standings} == {"probe", "bitfit"}


def test_rates_are_tried_without_test_rows_and_the_best_on_validation_is_taken(went: Any) -> None:
    bitfit = went[0].member("bitfit")
    assert [one.lr for one in bitfit.trials] == [0.001, 0.01]
    assert all("test" not in one.result["metrics"] for one in bitfit.trials)
    scores = {one.lr: one.result["metrics"]["validation"]["accuracy"] for one in bitfit.trials}
    best = max(scores.values())
    assert bitfit.runs[0].lr == min(lr for lr, score in scores.items() if score == best)
    assert {one.result["settings"]["train"]["steps"] for one in bitfit.trials} == {2}


def test_a_run_has_the_numbers_of_train_with_its_settings(went: Any, tmp_path: Path) -> None:
    from graftune.tasks.run import train
    from graftune.tasks.workspace import read_settings

    kept = went[0].member("bitfit").runs[0].result
    told = read_settings(Path(kept["run_dir"])).replaced(out=str(tmp_path / "again"))
    alone = train(told).to_dict()
    for key in ("history", "metrics", "confusion", "parameters"):
        assert alone[key] == kept[key]


def test_only_what_is_of_use_stays_in_the_folder(went: Any, place: Path) -> None:
    out = place / "out"
    assert {path.name for path in out.iterdir()} == {
        *("compare.yaml", FILE, "runs", "report.html", "worker.log")
    }
    assert {path.name for path in (out / "runs").iterdir()} >= {"bitfit-seed0", "probe-seed0"}
    assert not list((out / "runs").glob("*trial*"))
    assert not (out / "runs" / "bitfit-seed0" / "checkpoints").exists()


def test_the_same_command_again_only_makes_the_report(went: Any, place: Path) -> None:
    (place / "out" / "report.html").unlink()
    before = (place / "out" / FILE).read_bytes()
    watch = Watch()
    found = run(settings(place), watch=watch)
    assert watch.begun == []
    assert (place / "out" / FILE).read_bytes() == before
    assert [(one.label, one.interval) for one in found.standings] == [
        (one.label, one.interval) for one in went[0].standings
    ]
    assert "probe" in (place / "out" / "report.html").read_text()
    json.dumps(found.to_dict())


@pytest.mark.slow
def test_more_seeds_are_added_failed_runs_tried_again_and_numbers_come_out_the_same(
    went: Any, place: Path
) -> None:
    watch = Watch()
    more = settings(place, methods=["probe", "bitfit", "ia3"], seeds=[0, 1], name="more")
    found = run(more, watch=watch, retry=True)
    assert watch.begun == ["ia3, seed 0", "bitfit, seed 1", "ia3, seed 1"]
    assert all(one.status == "done" for one in found.members)
    anew = run(settings(place, methods=["bitfit"], seeds=[1, 0], out=str(place / "anew")))
    assert [one.result["metrics"] for one in reversed(anew.member("bitfit").runs)] == [
        one.result["metrics"] for one in found.member("bitfit").runs
    ]


@pytest.mark.slow
def test_what_is_over_the_budget_is_left_out_and_said(place: Path, tmp_path: Path) -> None:
    few = run(
        settings(
            place,
            methods=["bitfit", "full"],
            budget={"parameters": 2000},
            train={"steps": 4},
            out=str(tmp_path / "few"),
        )
    )
    told = {one.label: (one.status, one.why) for one in few.members}
    assert told["bitfit"] == ("done", "")
    assert told["full"][0] == "left out"
    assert "the budget is 2,000" in told["full"][1]
    assert [one.status for one in few.member("full").trials] == ["left out"]
    watch = Watch()
    small = run(
        settings(
            place,
            methods=["full"],
            budget={"memory": 1},
            train={"steps": 400},
            out=str(tmp_path / "small"),
        ),
        watch=watch,
    )
    assert watch.news == {"note", "start"}  # it is ended before its first step
    assert small.member("full").status == "left out"
    assert small.standings == ()
    assert "none can be recommended" in small.to_dict()["recommendation"][0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "make", "rows"),
    [
        ("labelling", tiny.bert, tiny.tagged()),
        ("spans", tiny.bert, tiny.passages()),
        ("instruct", tiny.llama, tiny.lessons()),
    ],
)
def test_methods_of_every_task_are_tested_row_by_row(
    tmp_path: Path, task: str, make: Any, rows: list[dict[str, Any]]
) -> None:
    data = tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    found = run(
        CompareSettings(
            base=str(make(tmp_path / "base")),
            task=task,
            data={"train": str(data), "max_length": 32},
            methods=["lora", {"name": "lora", "r": 1, "label": "low"}],
            seeds=[0],
            budget={"steps": 3},
            search=[],
            out=str(tmp_path / "out"),
        )
    )
    assert [one.status for one in found.members] == ["done", "done"]
    best, other = found.standings
    assert best.p is None
    assert other.p is not None


def test_two_processes_at_once_are_refused(place: Path, tmp_path: Path) -> None:
    from graftune.formats.atomic import locked

    out = tmp_path / "busy"
    with locked(out), pytest.raises(FormatError, match="busy"):
        run(settings(place, out=str(out), methods=["bitfit"]))


def test_errors_come_before_any_work(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "nothing"
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"methods": ["lora", "bitfitt"]}, SettingsError, 'methods, bitfitt: .*"BitFit"'),
        ({"data": str(place / "no.jsonl")}, DataError, r"no\.jsonl"),
        ({"methods": ["probe"], "task": "instruct"}, SettingsError, "a linear probe needs labels"),
        (
            {"data": {"train": str(place / "mail.jsonl"), "validation_fraction": 0}},
            SettingsError,
            "search chooses learning rates by the validation rows",
        ),
    ]
    for more, kind, told in cases:
        with pytest.raises(kind, match=told):
            run(settings(place, out=str(out), **more))
        assert not out.exists()
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    with pytest.raises(SettingsError, match="not a comparison's"):
        run(settings(place, out=str(foreign), methods=["bitfit"]))
    assert [path.name for path in foreign.iterdir()] == ["thesis.txt"]


def test_a_plan_says_how_many_runs_there_are(place: Path, tmp_path: Path) -> None:
    found = plan(settings(place, out=str(tmp_path / "none"), seeds=3))
    assert (found["trials"], found["runs"]) == (6, 10)
    bitfit = found["methods"][1]
    assert (bitfit["steps"], bitfit["trials"], bitfit["seeds"]) == (6, [0.001, 0.01], [0, 1, 2])
    assert not (tmp_path / "none").exists()
