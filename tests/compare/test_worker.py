"""A run that takes more memory than it may is ended at the step at which it does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from graftune.compare.worker import Relay, TooMuchError
from graftune.tasks.result import Checker, Silent
from graftune.tasks.settings import RunSettings
from graftune.tasks.training_run import TrainingRun
from graftune.training import memory
from tests.tasks import tiny

MANY = 400
"""Steps of a run, of which every fourth is logged."""


class Line:
    """A connection that keeps what is sent."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, Any]] = []

    def send(self, what: tuple[str, Any]) -> None:
        self.sent.append(what)


@pytest.fixture
def peaks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The peaks that are measured from now on, the last one for good; counts how many were."""
    told = [150]
    monkeypatch.setattr(memory, "peak_memory_bytes", lambda: told.pop(0) if told[1:] else told[0])
    return told


def test_each_kind_of_news_is_weighed_after_it_is_passed_on(peaks: list[int]) -> None:
    for news in ("on_start", "on_step", "on_eval"):
        line = Line()
        getattr(Relay(line, before=100, most=50), news)({"step": 1})
        with pytest.raises(TooMuchError, match="at least 0 MB of memory; the budget is 0 MB"):
            getattr(Relay(line, before=100, most=49), news)({"step": 1})
        assert len(line.sent) == 2


def test_without_a_budget_nothing_is_weighed() -> None:
    Relay(Line(), before=0, most=None).check()


def test_a_run_is_ended_at_the_step_that_takes_too_much(tmp_path: Path, peaks: list[int]) -> None:
    tiny.bert(tmp_path / "base")
    data = tiny.write_jsonl(tmp_path / "mail.jsonl", tiny.mail(60))
    settings = RunSettings(
        base=str(tmp_path / "base"),
        data=str(data),
        method="bitfit",
        train={"steps": MANY, "eval_every": 0},
        out=str(tmp_path / "run"),
    )
    line = Line()
    peaks[:] = [100] * 6 + [10**9]  # one before the first step, so that the sixth is too much
    with pytest.raises(TooMuchError):
        TrainingRun.prepared(settings, Relay(line, before=0, most=200)).run(
            resume=False, overwrite=True
        )
    logged = [what["step"] for kind, what in line.sent if kind == "step"]
    assert logged == [4]
    assert not (tmp_path / "run" / "result.json").exists()


def test_only_who_checks_is_asked_at_each_step() -> None:
    assert isinstance(Relay(Line(), 0, 1), Checker)
    assert not isinstance(Silent(), Checker)
