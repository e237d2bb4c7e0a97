"""Live progress of a run: a bar on a terminal, plain lines elsewhere. Written to standard error."""

from __future__ import annotations

import sys
import time
from typing import Any

from graftune.tasks.result import RunResult, Silent, Watcher

LINES_PER_RUN = 10
"""Without a terminal: a line for each tenth of the steps."""


def watcher(*, quiet: bool = False) -> Watcher:
    """Returns the watcher for where standard error goes: a terminal, a file, or nowhere."""
    if quiet:
        return Silent()
    return Live() if sys.stderr.isatty() else Lines()


def describe(plan: dict[str, Any]) -> str:
    """Returns one line that says what is about to be trained."""
    from graftune.compare.report import words

    parameters = plan.get("parameters") or {}
    trainable, share = parameters.get("trainable"), parameters.get("share")
    if "shots" in plan:
        return (
            f"{plan['method']} on {plan['base']}: {words.number(plan['shots'])} demonstrations, "
            f"{words.number(plan['total_steps'])} predictions"
        )
    counted = f", {words.number(trainable)} parameters" if trainable else ""
    counted += f" ({words.percent(share)} of the base)" if share else ""
    return (
        f"{plan.get('method', 'method')} on {plan.get('base', 'the base')}{counted}: "
        f"{words.number(plan.get('train_rows'))} rows, "
        f"{words.number(plan.get('total_steps'))} steps"
    )


def step_fields(state: dict[str, Any]) -> dict[str, str]:
    """Returns a logged step in words: loss, rate, time left, peak memory.

    Example:
        >>> step_fields({"loss": 0.51, "lr": 1e-3, "seconds_left": 65, "peak_memory_bytes": 8e8})
        {'loss': '0.5100', 'rate': '1.0e-03', 'left': '1 min 5 s', 'peak': '800 MB'}
    """
    from graftune.compare.report import words

    loss, rate = state.get("loss"), state.get("lr")
    return {
        "loss": "–" if loss is None else f"{loss:.4f}",
        "rate": "–" if rate is None else f"{rate:.1e}",
        "left": words.duration(state.get("seconds_left")),
        "peak": words.size(state.get("peak_memory_bytes")),
    }


def evaluation(metrics: dict[str, Any]) -> str:
    """Returns one line with an evaluation's metrics.

    Example:
        >>> evaluation({"step": 60, "epoch": 1.0, "eval_loss": 0.4, "eval_accuracy": 0.91})
        'step 60: validation loss 0.4, accuracy 91.0 %'
    """
    from graftune.compare.report import words

    shown = {key.removeprefix("eval_"): value for key, value in metrics.items()}
    parts = [
        f"{words.metric_name(key)} {words.metric_value(key, value)}"
        for key, value in shown.items()
        if key in words.METRICS and isinstance(value, int | float)
    ]
    return f"step {metrics.get('step', '–')}: validation {', '.join(parts)}"


class Lines:
    """Plain lines on standard error: one per tenth of the run, per evaluation, per note."""

    def __init__(self) -> None:
        self._tenth = 0

    def on_start(self, plan: dict[str, Any]) -> None:
        """Says what is trained."""
        self._tenth = 0
        self._say(describe(plan))

    def on_step(self, state: dict[str, Any]) -> None:
        """Says where the run is, ten times in all."""
        step, total = int(state.get("step", 0)), max(int(state.get("total", 1)), 1)
        tenth = step * LINES_PER_RUN // total
        if tenth > self._tenth:
            self._tenth = tenth
            fields = step_fields(state)
            parts = [f"{name} {said}" for name, said in fields.items() if said != "–"]
            self._say("  ".join([f"step {step}/{total}", *parts]))

    def on_eval(self, metrics: dict[str, Any]) -> None:
        """Says an evaluation's metrics."""
        self._say(evaluation(metrics))

    def on_note(self, note: str) -> None:
        """Says a note."""
        self._say(note)

    def on_end(self, result: RunResult) -> None:
        """Says nothing: the command prints the result."""

    def _say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


class Live:
    """A live bar on the terminal: step, loss, learning rate, time left, peak memory."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True, highlight=False)
        self._bar: Any = None
        self._task: Any = None
        self._began = time.monotonic()

    def on_start(self, plan: dict[str, Any]) -> None:
        """Draws the bar."""
        self._stop()
        self._console.print(describe(plan), markup=False)
        self._bar = _bar(self._console)
        self._bar.start()
        blank = {"loss": "–", "rate": "–", "left": "–", "peak": "–", "score": ""}
        self._task = self._bar.add_task("", total=plan.get("total_steps"), **blank)

    def on_step(self, state: dict[str, Any]) -> None:
        """Moves the bar."""
        if self._bar is not None:
            self._bar.update(self._task, completed=state.get("step", 0), **step_fields(state))

    def on_eval(self, metrics: dict[str, Any]) -> None:
        """Shows the last evaluation behind the bar."""
        text = evaluation(metrics).partition("validation ")[2]
        if self._bar is not None:
            self._bar.update(self._task, score=text)
        else:
            self._console.print(evaluation(metrics), markup=False)

    def on_note(self, note: str) -> None:
        """Prints a note above the bar."""
        self._console.print(note, markup=False, style="dim")

    def on_end(self, result: RunResult) -> None:
        """Leaves the bar as it is."""
        self._stop()

    def __del__(self) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _bar(console: Any) -> Any:
    """Returns the empty bar with its columns."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    return Progress(
        MofNCompleteColumn(),
        BarColumn(bar_width=24),
        TextColumn("loss {task.fields[loss]}"),
        TextColumn("rate {task.fields[rate]}"),
        TextColumn("left {task.fields[left]}"),
        TextColumn("peak {task.fields[peak]}"),
        TextColumn("[dim]{task.fields[score]}"),
        console=console,
        refresh_per_second=5,
    )
