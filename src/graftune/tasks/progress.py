"""What a training run tells while it runs: to its watcher and into `metrics.jsonl`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from graftune import processes
from graftune.tasks.result import Checker, Watcher
from graftune.tasks.workspace import write_lines
from graftune.training.memory import peak_memory_bytes

_UNTOLD = ("runtime", "per_second", "total_flos", "train_loss", "num_input_tokens_seen")


class Progress(TrainerCallback):
    """Passes on what the Trainer logs."""

    def __init__(self, watcher: Watcher, log: Path, plan: dict[str, Any]) -> None:
        self.watcher, self.log, self.plan = watcher, log, plan
        self.began = time.monotonic()
        self.first_step = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Announces the plan, and writes the log of what a resumed run has behind it."""
        self.began = time.monotonic()
        self.first_step = state.global_step
        write_lines(self.log, history(state.log_history))
        self.watcher.on_start({**self.plan, "total_steps": state.max_steps})

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Adds a row to the log and shows it."""
        for row in history(state.log_history[-1:]):
            if processes.is_first():
                with self.log.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
            if "eval_loss" in row:
                self.watcher.on_eval(row)
            else:
                self.watcher.on_step({**row, **self._clock(state)})

    def _clock(self, state: TrainerState) -> dict[str, Any]:
        seconds = time.monotonic() - self.began
        done = max(state.global_step - self.first_step, 1)
        return {
            "total": state.max_steps,
            "seconds": seconds,
            "seconds_left": seconds / done * (state.max_steps - state.global_step),
            "peak_memory_bytes": peak_memory_bytes(),
        }


class EachStep(TrainerCallback):
    """Lets a watcher end the run after any step."""

    def __init__(self, checker: Checker) -> None:
        self.checker = checker

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Asks it."""
        self.checker.check()


class TimeLimit(TrainerCallback):
    """Ends training after so many seconds, once what is reached is measured and kept."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.began = seconds, time.monotonic()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Starts the clock."""
        self.began = time.monotonic()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Asks for the end; what goes by epochs is measured there by itself."""
        if time.monotonic() - self.began < self.seconds:
            return
        control.should_training_stop = True
        control.should_evaluate |= args.eval_strategy == "steps"
        control.should_save |= args.save_strategy == "steps"


def history(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the Trainer's log with our names: `lr`, and without timings and totals."""
    kept: list[dict[str, Any]] = []
    for row in rows:
        named = {
            "lr" if key == "learning_rate" else key: value
            for key, value in row.items()
            if not any(part in key for part in _UNTOLD)
        }
        if named.keys() & {"loss", "eval_loss"}:
            kept.append(named)
    return kept
