"""The parent's side of the worker: it hands out jobs, and starts another process when one dies."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from graftune.compare.worker import work

News = Callable[[str, Any], None]
_PATIENCE_S = 10


class Crew:
    """One process at a time, started when it is needed.

    Args:
        folder: the comparison's.
        rehearsal: the settings of any run of an adapter, by which what runs share is made.
    """

    def __init__(self, folder: Path, rehearsal: dict[str, Any] | None) -> None:
        self.folder, self.rehearsal = folder, rehearsal
        self._process: Any = None
        self._line: Any = None

    def start(self) -> None:
        """Starts a process, unless one runs."""
        if self._process is not None and self._process.is_alive():
            return
        context = multiprocessing.get_context("spawn")
        self._line, end = context.Pipe()
        told = (end, str(self.folder), self.rehearsal)
        self._process = context.Process(target=work, args=told, daemon=True)
        self._process.start()
        end.close()  # so that this end is told when the process dies

    def do(self, job: dict[str, Any], told: News) -> dict[str, Any]:
        """Returns how a job ended, telling on the way what the run tells."""
        self.start()
        began = time.monotonic()
        try:
            ended = self._done(job, told)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            ended = {"status": "failed", "why": self._why(), "memory_bytes": None, "result": {}}
            self.close(at_once=True)
        if ended.pop("again", False):  # who knows what such an error leaves behind
            self.close()
        return {"seconds": time.monotonic() - began, **ended}

    def close(self, *, at_once: bool = False) -> None:
        """Ends the process: after what it does, or at once."""
        if self._process is None:
            return
        if not at_once and self._line is not None and self._process.is_alive():
            self._line.send(None)
            self._process.join(_PATIENCE_S)
        if self._process.is_alive():
            self._process.kill()
        self._process.join()
        self._process = self._line = None

    def _done(self, job: dict[str, Any], told: News) -> dict[str, Any]:
        self._line.send(job)
        while True:
            kind, what = self._line.recv()
            if kind == "end":
                return dict(what)
            told(kind, what)

    def _why(self) -> str:
        """Returns why the process died, in words."""
        self._process.join(_PATIENCE_S)
        code: int | None = self._process.exitcode
        if code is not None and code < 0:
            name = signal.Signals(-code).name
            more = ", as the system does when memory runs out" if -code == signal.SIGKILL else ""
            return f"its process was ended by {name}{more}"
        return f"its process ended with exit code {code}"
