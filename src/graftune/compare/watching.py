"""Who may watch a comparison. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from graftune.compare.members import Cell
from graftune.compare.results import Record


class CompareWatcher(Protocol):
    """Who watches a comparison. All methods are called between its runs' messages."""

    def on_plan(self, labels: Sequence[str], total: int) -> None:
        """It begins: the methods' names, and the number of trials and runs."""
        ...

    def on_run(self, cell: Cell) -> None:
        """A run begins."""
        ...

    def on_news(self, cell: Cell, kind: str, what: Any) -> None:
        """A run tells something: "start", "step", "eval" or "note", as to a run's watcher."""
        ...

    def on_end(self, cell: Cell, record: Record, *, is_new: bool) -> None:
        """A run ended now, or was found finished."""
        ...


class Unwatched:
    """The watcher that says nothing."""

    def on_plan(self, labels: Sequence[str], total: int) -> None:
        """Does nothing."""

    def on_run(self, cell: Cell) -> None:
        """Does nothing."""

    def on_news(self, cell: Cell, kind: str, what: Any) -> None:
        """Does nothing."""

    def on_end(self, cell: Cell, record: Record, *, is_new: bool) -> None:
        """Does nothing."""
