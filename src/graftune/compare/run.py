"""Runs a comparison: many methods and seeds on one task, under one budget.

    trials   each method's learning rates, the same number and as many steps for all; the best on
             the validation rows is chosen, by the first seed
    runs     each method with each seed at that rate, measured on the test rows

The folder holds `compare.yaml`, `results.jsonl` (a line for each finished run), `runs/` (each run's
directory) and `report.html`. What is finished there is not done again: the same command goes on
where it was stopped, and with more methods or seeds it does what is missing.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftune.compare.crew import Crew
from graftune.compare.members import (
    Cell,
    Member,
    members_of,
    rated,
    run_settings,
    trial_settings,
)
from graftune.compare.outcome import Comparison, MemberOutcome
from graftune.compare.results import FILE, Record, Results, Status
from graftune.compare.settings import CompareSettings
from graftune.compare.watching import CompareWatcher, Unwatched
from graftune.errors import SettingsError
from graftune.tasks.settings import RunSettings

if TYPE_CHECKING:
    from graftune.tasks.task import Task
    from graftune.tasks.workshop import Workshop

SETTINGS = "compare.yaml"
REPORT = "report.html"
FALLING = ("loss", "perplexity")


def run(
    settings: CompareSettings, *, watch: CompareWatcher | None = None, retry: bool = False
) -> Comparison:
    """Does what is missing of a comparison, writes its report, and returns what came of it.

    Called in a script, it must stand below `if __name__ == "__main__":`, since the runs are done in
    a process of their own, which reads the script again.

    Args:
        settings: What to compare, on what, and where to.
        watch: Who is told of the progress.
        retry: Do runs again that failed or were left out.

    Raises:
        SettingsError: A setting can't be, of the comparison or of one of its runs.
        DataError: The data can't be trained on.
        FormatError: Another process works in the folder.
    """
    from graftune.compare.report.methods import write_page
    from graftune.formats.atomic import locked

    began = time.monotonic()
    plan = Plan.of(settings)
    watcher = watch or Unwatched()
    folder = settings.folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder, timeout_s=0):
        _claim(folder, settings)
        results = Results(folder)
        outcomes = _Work(plan, results, watcher, retry).outcomes()
        found = Comparison.of(settings, plan, outcomes, time.monotonic() - began)
        write_page(found, folder / REPORT)
    return found


def plan(settings: CompareSettings) -> dict[str, Any]:
    """Returns what `run` would do, for a dry run: reads and checks the data, loads no weights.

    Raises:
        SettingsError: A setting can't be, of the comparison or of one of its runs.
        DataError: The data can't be trained on.
    """
    found = Plan.of(settings)
    results = Results(settings.folder)
    return {
        "settings": settings.to_dict(),
        "data": found.data,
        "methods": [found.told(member, results) for member in found.members],
        "trials": sum(len(found.trials(member)) for member in found.members),
        "runs": sum(len(member.seeds) for member in found.members),
        "budget": str(settings.budget),
    }


@dataclass(frozen=True)
class Plan:
    """Settings that are known to be sound, and the data that they are for."""

    settings: CompareSettings
    members: list[Member]
    wholes: dict[str, RunSettings]
    """Each member's first run, every default filled in."""
    steps: dict[str, int]
    """Optimiser steps of each member's run."""
    metric: str
    """What learning rates are chosen by."""
    data: dict[str, Any]
    """`DataReport.to_dict()`."""

    @classmethod
    def of(cls, settings: CompareSettings) -> Plan:
        """Returns the plan of a comparison.

        Raises:
            SettingsError: A setting can't be.
            DataError: The data can't be trained on.
        """
        from graftune.tasks.task import find_task
        from graftune.tasks.workshop import Workshop

        members = members_of(settings)
        task = find_task(settings.task, settings.task_options)
        workshop = Workshop()
        wholes: dict[str, RunSettings] = {}
        steps: dict[str, int] = {}
        for member in members:
            whole = run_settings(settings, member, member.seeds[0])
            wholes[member.label], steps[member.label] = _checked(member, whole, task, workshop)
        data = workshop.data(next(iter(wholes.values())), task)
        _check_search(settings, members, data.splits)
        metric = settings.train.metric or task.metric
        return cls(settings, members, wholes, steps, metric, data.report.to_dict())

    def trials(self, member: Member) -> list[Cell]:
        """Returns the trials of a member's learning rates; [] of one that has none to choose."""
        whole, search = self.wholes[member.label], self.settings.search
        if member.kind != "adapter" or len(search) < 2:
            return []
        steps = self.steps[member.label]
        return [
            self._cell(member, trial_settings(self.settings, whole, one, steps), one)
            for one in search
        ]

    def run(self, member: Member, seed: int, lr: float | None) -> Cell:
        """Returns a run of a member at a learning rate; None for its only one."""
        if member.kind != "adapter":
            lr = None
        elif lr is None and len(self.settings.search) == 1:
            lr = rated(self.wholes[member.label], self.settings.search[0])
        whole = self.wholes[member.label]
        out = self.settings.folder / "runs" / f"{member.slug}-seed{seed}"
        train = {"seed": seed, **({"lr": lr} if lr is not None else {})}
        return self._cell(member, whole.replaced(train=train, out=str(out)), None)

    def told(self, member: Member, results: Results) -> dict[str, Any]:
        """Returns what will be done with a member, and how much of it is finished."""
        whole, trials = self.wholes[member.label], self.trials(member)
        return {
            "label": member.label,
            "method": member.method,
            "steps": self.steps[member.label],
            "lr": whole.train.lr if member.kind == "adapter" else None,
            "trials": [cell.settings.train.lr for cell in trials],
            "trials_finished": sum(results.get(cell.key) is not None for cell in trials),
            "seeds": list(member.seeds),
        }

    def _cell(self, member: Member, settings: RunSettings, multiple: float | None) -> Cell:
        return Cell(member, settings.train.seed, settings, multiple, self.data["hashes"])


class _Work:
    """What is done while the folder is held."""

    def __init__(self, plan: Plan, results: Results, watcher: CompareWatcher, retry: bool) -> None:
        self.plan, self.results, self.watcher, self.retry = plan, results, watcher, retry
        adapters = [one.label for one in plan.members if one.kind == "adapter"]
        rehearsal = plan.wholes[adapters[0]].to_dict() if adapters else None
        self.crew = Crew(plan.settings.folder, rehearsal)
        self.again: set[str] = set()
        """What was done by this command, so that it isn't tried twice."""

    def outcomes(self) -> list[MemberOutcome]:
        """Returns how all members did, once what is missing is done."""
        members = self.plan.members
        total = sum(len(self.plan.trials(m)) + len(m.seeds) for m in members)
        self.watcher.on_plan([member.label for member in members], total)
        try:
            outcomes = {member.label: self._first(member) for member in members}
            for seed in self.plan.settings.seeds:
                for member in members:
                    if seed in member.seeds[1:]:
                        outcomes[member.label] = self._next(member, seed, outcomes[member.label])
        except BaseException:
            self.crew.close(at_once=True)
            raise
        finally:
            shutil.rmtree(self.plan.settings.folder / "shared", ignore_errors=True)
        self.crew.close()
        return list(outcomes.values())

    def _first(self, member: Member) -> MemberOutcome:
        """Returns a member's trials and the run of its first seed."""
        trials: list[Record] = []
        for cell in self.plan.trials(member):
            trials.append(self._record(cell))
            if trials[-1].status == "left out":  # no rate changes what a method takes
                break
        found = MemberOutcome(member.label, member.kind, tuple(trials), ())
        lr = _best_rate(trials, self.plan.metric)
        if trials and lr is None:
            return replace(found, status=_worst(trials), why=trials[0].why)
        return self._next(member, member.seeds[0], replace(found, lr=lr))

    def _next(self, member: Member, seed: int, so_far: MemberOutcome) -> MemberOutcome:
        """Returns an outcome with one more seed; one that has ended stays as it is."""
        if so_far.status == "left out" or (so_far.status == "failed" and not so_far.runs):
            return so_far
        record = self._record(self.plan.run(member, seed, so_far.lr))
        runs = (*so_far.runs, record)
        bad = [one for one in runs if not one.is_done]
        status = _worst(bad) if bad else "done"
        why = "; ".join(dict.fromkeys(one.why for one in bad))
        return replace(so_far, runs=runs, status=status, why=why)

    def _record(self, cell: Cell) -> Record:
        """Returns how a run ended, doing it if nothing is known of it."""
        known = self.results.get(cell.key)
        is_old = known is not None and (known.is_done or not self.retry)
        if known is not None and (is_old or cell.key in self.again):
            self.watcher.on_end(cell, known, is_new=False)
            return known
        self.again.add(cell.key)
        self.watcher.on_run(cell)
        budget = self.plan.settings.budget
        job = {
            "kind": cell.member.kind,
            "settings": cell.settings.to_dict(),
            "is_trial": cell.is_trial,
            "parameters": budget.parameters,
            "memory": budget.memory,
        }
        ended = self.crew.do(job, lambda kind, what: self.watcher.on_news(cell, kind, what))
        record = Record(
            key=cell.key,
            label=cell.member.label,
            seed=cell.seed,
            lr=cell.settings.train.lr if cell.member.kind == "adapter" else None,
            multiple=cell.multiple,
            **ended,
        )
        self.results.add(record)
        self.watcher.on_end(cell, record, is_new=True)
        return record


def _checked(
    member: Member, whole: RunSettings, task: Task, workshop: Workshop
) -> tuple[RunSettings, int]:
    """Returns a run's settings with every default filled in, and its steps, once all is checked."""
    if member.kind == "probe":
        if task.name != "classification":
            raise SettingsError(
                f"methods, {member.label}: a linear probe needs labels; the task {task.name} has "
                "none."
            )
        return whole, 0
    from graftune.tasks.fitting import total_steps
    from graftune.tasks.in_context_run import InContextRun
    from graftune.tasks.result import Silent
    from graftune.tasks.training_run import TrainingRun

    try:
        if member.kind == "in-context":
            return InContextRun.prepared(whole, Silent(), workshop).settings, 0
        run = TrainingRun.prepared(whole, Silent(), workshop)
        run.plan()
    except SettingsError as error:
        raise SettingsError(f"methods, {member.label}: {error}") from error
    return run.settings, total_steps(run.settings, len(run.data.splits["train"]))


def _check_search(
    settings: CompareSettings, members: Sequence[Member], splits: dict[str, Any]
) -> None:
    learns = any(member.kind == "adapter" for member in members)
    if learns and len(settings.search) > 1 and "validation" not in splits:
        raise SettingsError(
            "search chooses learning rates by the validation rows, and there are none: set "
            "search: [] or give some."
        )


def _claim(folder: Path, settings: CompareSettings) -> None:
    """Makes a comparison's folder, or takes an earlier one's.

    Raises:
        SettingsError: It is a file, or holds something else.
    """
    from graftune.tasks.workspace import write_text

    if folder.exists() and not folder.is_dir():
        raise SettingsError(f'"{folder}" is a file; a comparison needs a folder (out).')
    if folder.is_dir() and any(folder.iterdir()):
        own = (folder / SETTINGS).exists() or (folder / FILE).exists()
        if not own:
            raise SettingsError(
                f'"{folder}" holds files that are not a comparison\'s; choose another folder (out).'
            )
    folder.mkdir(exist_ok=True)
    write_text(folder / SETTINGS, settings.to_yaml())


def _best_rate(trials: Sequence[Record], metric: str) -> float | None:
    """Returns the learning rate that did best on the validation rows, the lower one of equals."""
    scored = [
        (one.result["metrics"]["validation"][metric], one.lr or 0.0)
        for one in trials
        if one.is_done and metric in one.result["metrics"].get("validation", {})
    ]
    if not scored:
        return None
    sign = 1 if metric in FALLING else -1
    return min(scored, key=lambda pair: (sign * pair[0], pair[1]))[1]


def _worst(records: Sequence[Record]) -> Status:
    found = {one.status for one in records}
    return "left out" if "left out" in found else "failed"
