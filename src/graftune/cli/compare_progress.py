"""Live progress of a comparison: a table on a terminal, else plain lines; on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from graftune.compare.watching import CompareWatcher, Unwatched

if TYPE_CHECKING:
    from graftune.compare.members import Cell
    from graftune.compare.results import Record


class Screen(CompareWatcher, Protocol):
    """A watcher that draws on the screen until it is closed."""

    def close(self) -> None:
        """Leaves the screen as it is."""
        ...


def watcher(*, quiet: bool = False) -> Screen:
    """Returns the watcher for where standard error goes: a terminal, a file, or nowhere."""
    if quiet:
        return Nothing()
    return Table() if sys.stderr.isatty() else Lines()


def ending(record: Record) -> str:
    """Returns how a run ended, in a few words."""
    from graftune.compare.report import words
    from graftune.compare.report.view import main_metric

    if not record.is_done:
        return f"{record.status}: {record.why}"
    main = main_metric(record.result)
    if main is None:
        return "done"
    return f"{words.metric_value(main[0], main[1])} {words.metric_name(main[0])}"


class Nothing(Unwatched):
    """Shows nothing."""

    def close(self) -> None:
        """Does nothing."""


class Clock:
    """How many runs there are and have ended, and about how long the rest takes."""

    def __init__(self) -> None:
        self.total = self.ended = self.new = 0
        self.began = time.monotonic()

    def end(self, is_new: bool) -> None:
        """Counts a run that ended, or was found finished."""
        self.ended += 1
        self.new += is_new
        if not self.new:
            self.began = time.monotonic()

    def left(self) -> float | None:
        """Returns the seconds that are left; None before a run ended."""
        if not self.new:
            return None
        return (time.monotonic() - self.began) / self.new * (self.total - self.ended)


class Lines(Unwatched):
    """A line for each run that ends."""

    def __init__(self) -> None:
        self.clock = Clock()

    def on_plan(self, labels: Sequence[str], total: int) -> None:
        """Says what is compared."""
        self.clock.total = total
        self._say(f"{', '.join(labels)}: {total} runs and trials")

    def on_end(self, cell: Cell, record: Record, *, is_new: bool) -> None:
        """Says how a run ended, and how long the rest takes."""
        from graftune.compare.report import words

        self.clock.end(is_new)
        left = self.clock.left()
        parts = [f"[{self.clock.ended}/{self.clock.total}] {cell.title}: {ending(record)}"]
        parts += [words.duration(record.seconds)] if is_new else ["kept"]
        parts += [f"left {words.duration(left)}"] if left else []
        self._say("  ".join(parts))

    def close(self) -> None:
        """Does nothing."""

    def _say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


class Table(Unwatched):
    """A live table: each method's trials and runs, what runs now, and the time left."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live

        self.clock = Clock()
        self.said: dict[str, dict[str, str]] = {}
        self.now = ""
        self._live: Any = Live(
            console=Console(stderr=True, highlight=False),
            refresh_per_second=4,
            get_renderable=self._drawn,
        )

    def on_plan(self, labels: Sequence[str], total: int) -> None:
        """Draws the empty table."""
        self.clock.total = total
        self.said = {label: {"trials": "", "runs": "", "now": ""} for label in labels}
        self._live.start()

    def on_run(self, cell: Cell) -> None:
        """Marks what runs now."""
        for row in self.said.values():
            row["now"] = ""
        self.said[cell.member.label]["now"] = "loading"

    def on_news(self, cell: Cell, kind: str, what: Any) -> None:
        """Moves the progress of what runs now."""
        from graftune.compare.report import words

        if kind == "step":
            left = words.duration(what.get("seconds_left"))
            share = what.get("step", 0) / max(what.get("total", 1), 1)
            self.said[cell.member.label]["now"] = f"{share:4.0%}  left {left}"

    def on_end(self, cell: Cell, record: Record, *, is_new: bool) -> None:
        """Writes down how a run ended."""
        self.clock.end(is_new)
        row = self.said[cell.member.label]
        row["now"] = ""
        if cell.is_trial:
            row["trials"] += "·" if record.is_done else "✗"
        else:
            row["runs"] = "  ".join(filter(None, (row["runs"], ending(record))))

    def close(self) -> None:
        """Leaves the table as it is."""
        self._live.stop()

    def _drawn(self) -> Any:
        from rich.console import Group
        from rich.table import Table as Drawn
        from rich.text import Text

        from graftune.compare.report import words

        table = Drawn(box=None, pad_edge=False, header_style="bold")
        for column in ("method", "trials", "runs", "now"):
            table.add_column(column)
        for label, row in self.said.items():
            table.add_row(Text(label), row["trials"], Text(row["runs"]), row["now"])
        clock = self.clock
        left = f"{clock.ended} of {clock.total}, left {words.duration(clock.left())}"
        return Group(table, Text(left, style="dim"))
