"""The process that does a comparison's runs one after another, so that a crash ends only itself.

    parent  ──job──>  worker        {"kind", "settings", "is_trial", "parameters", "memory"}
    parent  <──news── worker        ("start" | "step" | "eval" | "note", what a watcher is told)
    parent  <──end─── worker        ("end", {"status", "why", "memory_bytes", "seconds", "result"})

A job that is None is the last. What runs share is made in a rehearsal before the first of them, so
that no run pays for it in time or in memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from graftune.errors import GraftuneError
from graftune.tasks.result import RunResult, Silent
from graftune.tasks.settings import RunSettings
from graftune.tasks.workspace import CHECKPOINTS

LOG = "worker.log"
"""In the comparison's folder: what libraries print."""


class TooMuchError(Exception):
    """A run is over the budget."""


class Relay:
    """Passes on what a run tells, and ends one that takes more memory than it may.

    Args:
        connection: to the parent.
        before: bytes that the process held before the run.
        most: bytes that the run may take; None for any.
        lent: tells which of the bytes held before are the run's base, which counts as its own.
    """

    def __init__(
        self,
        connection: Any,
        before: int,
        most: int | None,
        lent: Callable[[], int] = lambda: 0,
    ) -> None:
        self.connection, self.before, self.most, self.lent = connection, before, most, lent

    def on_start(self, plan: dict[str, Any]) -> None:
        """See `Watcher`."""
        self.connection.send(("start", plan))
        self.check()

    def on_step(self, state: dict[str, Any]) -> None:
        """See `Watcher`."""
        self.connection.send(("step", state))
        self.check()

    def on_eval(self, metrics: dict[str, Any]) -> None:
        """See `Watcher`."""
        self.connection.send(("eval", metrics))
        self.check()

    def on_note(self, note: str) -> None:
        """See `Watcher`."""
        self.connection.send(("note", note))

    def on_end(self, result: RunResult) -> None:
        """See `Watcher`."""

    def taken(self, peak: int) -> int:
        """Returns what of the process's peak is the run's own."""
        return max(peak - self.before + self.lent(), 0)

    def check(self) -> None:
        """Raises TooMuchError once the run has taken more memory than it may; see `Checker`."""
        from graftune.training.memory import peak_memory_bytes

        if self.most is None:
            return
        taken = self.taken(peak_memory_bytes())
        if taken > self.most:
            raise TooMuchError(
                f"it takes at least {_size(taken)} of memory; the budget is {_size(self.most)}"
            )


def work(connection: Any, folder: str, rehearsal: dict[str, Any] | None) -> None:
    """Does jobs until there are no more, or nobody is left to do them for.

    Args:
        connection: To the parent.
        folder: The comparison's.
        rehearsal: The settings of any run of an adapter; None where there is none.
    """
    _end_with_parent()
    place = Path(folder)
    _print_to(place / LOG)
    bench = _Bench(place / "shared")
    bench.rehearse(rehearsal)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while (job := connection.recv()) is not None:
            connection.send(("end", bench.done(job, connection)))


class _Bench:
    """What the jobs of one process share."""

    def __init__(self, folder: Path) -> None:
        from graftune.tasks.workshop import Workshop

        self.workshop = Workshop(folder)

    def rehearse(self, settings: dict[str, Any] | None) -> None:
        """Makes what runs share; what is wrong with it, they will tell themselves."""
        from graftune.tasks.training_run import TrainingRun

        if settings is not None:
            run = RunSettings.from_dict(settings)
            with contextlib.suppress(Exception):
                TrainingRun.prepared(run, Silent(), self.workshop).rehearse()

    def done(self, job: dict[str, Any], connection: Any) -> dict[str, Any]:
        """Returns how a job ended."""
        settings = RunSettings.from_dict(job["settings"])
        began = time.monotonic()
        ended: dict[str, Any] = {"status": "done", "why": "", "memory_bytes": None, "result": {}}
        try:
            if job["kind"] == "adapter":
                self._weigh(settings, job["parameters"])
            before = _held()
            began = time.monotonic()
            self.workshop.lent = 0
            watcher = Relay(connection, before, job["memory"], lambda: self.workshop.lent)
            result = self._run(job["kind"], settings, watcher, is_trial=job["is_trial"])
            ended["memory_bytes"] = watcher.taken(result.peak_memory_bytes)
            _check_after(result, ended["memory_bytes"], job)
            ended["result"] = result.to_dict()
        except TooMuchError as over:
            ended |= {"status": "left out", "why": str(over)}
        except GraftuneError as error:
            ended |= {"status": "failed", "why": str(error)}
        except Exception as error:
            what = " ".join(str(error).split()) or "no message"
            ended |= {"status": "failed", "why": f"{type(error).__name__}: {what}", "again": True}
        finally:
            _tidy(settings.run_dir, keep=ended["status"] == "done" and not job["is_trial"])
        return {**ended, "seconds": time.monotonic() - began}

    def _weigh(self, settings: RunSettings, most: float | None) -> None:
        """Raises TooMuchError for a run that trains more parameters than it may."""
        from graftune.tasks.training_run import TrainingRun

        if most is None:
            return
        trained, base = TrainingRun.prepared(settings, Silent(), self.workshop).trainable()
        _check_parameters(trained, base, most)

    def _run(
        self, kind: str, settings: RunSettings, watcher: Relay, *, is_trial: bool
    ) -> RunResult:
        if kind == "probe":
            from graftune.tasks.probe import run_probe

            return run_probe(settings, watcher, overwrite=True, source=self.workshop)
        if kind == "in-context":
            from graftune.tasks.in_context_run import InContextRun

            prompts = InContextRun.prepared(settings, watcher, self.workshop)
            return prompts.run(resume=False, overwrite=True)
        from graftune.tasks.training_run import TrainingRun

        run = TrainingRun.prepared(settings, watcher, self.workshop)
        if is_trial:  # a learning rate is never chosen by test rows
            run.data.splits.pop("test", None)
        return run.run(resume=False, overwrite=True)


def _check_after(result: RunResult, memory: int, job: dict[str, Any]) -> None:
    """Raises TooMuchError for a run that turned out to be over the budget."""
    if job["memory"] is not None and memory > job["memory"]:
        raise TooMuchError(
            f"it takes {_size(memory)} of memory; the budget is {_size(job['memory'])}"
        )
    if job["parameters"] is not None:
        found = result.parameters
        _check_parameters(found["trainable"], found["base"], job["parameters"])


def _check_parameters(trained: int, base: int, most: float) -> None:
    limit = most * base if most < 1 else most
    if trained > limit:
        raise TooMuchError(f"it trains {trained:,} parameters; the budget is {limit:,.0f}")


def _held() -> int:
    """Returns the bytes in use now, once what is free is given back."""
    import psutil
    import torch

    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        return sum(map(torch.cuda.memory_allocated, range(torch.cuda.device_count())))
    with contextlib.suppress(OSError, AttributeError):  # glibc alone has it
        ctypes.CDLL(None).malloc_trim(0)
    return int(psutil.Process().memory_info().rss)


def _tidy(run_dir: Path, *, keep: bool) -> None:
    """Removes what a run is done with: checkpoints, and all of one that isn't kept."""
    shutil.rmtree(run_dir / CHECKPOINTS if keep else run_dir, ignore_errors=True)


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def _print_to(log: Path) -> None:
    """Sends what libraries print into a file; the screen is the parent's."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)


def _end_with_parent() -> None:
    """Ends this process as soon as its parent is gone, even killed, in the middle of a run."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
