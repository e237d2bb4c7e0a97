"""Rounds in which two sides take turns, and what comes of them."""

from __future__ import annotations

import dataclasses
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROUNDS = 5
ROOT = Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table: a median with its spread, against a target."""

    name: str
    value: float
    low: float
    high: float
    target: float
    unit: str = "× PEFT"
    note: str = ""
    date: str = ""

    @property
    def is_met(self) -> bool:
        return self.value <= self.target

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "is_met": self.is_met}


def row(name: str, values: Sequence[float], target: float, **more: Any) -> Row:
    """Returns the median of the rounds' values with their spread."""
    value = statistics.median(values)
    return Row(name=name, value=value, low=min(values), high=max(values), target=target, **more)


def take_turns(
    sides: dict[str, Callable[[], Any]], rounds: int = ROUNDS, *, repeat: int = 1
) -> list[dict[str, float]]:
    """Returns each round's CPU seconds per call of every side; the order is turned each round."""
    for call in sides.values():
        call()
    found: list[dict[str, float]] = []
    for number in range(rounds):
        names = list(sides) if number % 2 else list(sides)[::-1]
        times = {name: cpu_seconds(sides[name], repeat) for name in names}
        found.append(times)
    return found


def cpu_seconds(call: Callable[[], Any], repeat: int = 1) -> float:
    """Returns the CPU seconds of this process that one of `repeat` calls takes."""
    begin = time.process_time()
    for _ in range(repeat):
        call()
    return (time.process_time() - begin) / repeat


def fresh_process(*arguments: str) -> tuple[float, str]:
    """Returns (CPU seconds, output) of a fresh Python process, one thread, from start to end.

    Raises:
        RuntimeError: it failed; its last lines are told.
    """
    before = os.times()
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | single_thread(),
        capture_output=True,
        text=True,
        check=False,
    )
    after = os.times()
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)}: {done.stderr[-1000:]}")
    seconds = after.children_user + after.children_system
    return seconds - before.children_user - before.children_system, done.stdout


def single_thread() -> dict[str, str]:
    """Returns the environment in which a process computes on one thread and asks no network."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")
    return dict.fromkeys(names, "1") | {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
    }
