"""From settings to a trained adapter, its metrics and its predictions.

A run's directory holds `run.yaml` (the settings, every default filled in), `env.json`,
`metrics.jsonl`, `adapter/`, `checkpoints/`, `predictions.test.jsonl` and, last, `result.json`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from graftune.tasks.result import RunResult, Watcher
from graftune.tasks.settings import RunSettings


def train(
    settings: RunSettings,
    *,
    watch: Watcher | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> RunResult:
    """Trains an adapter and returns what came of it.

    Args:
        settings: What to train, on what, how, and where to.
        watch: Who is told of the progress.
        resume: Go on from the run directory's last checkpoint (or from the start without one).
        overwrite: Replace a run that the directory already holds; never foreign files.

    Raises:
        SettingsError: A setting can't be; or the run's directory is taken.
        DataError: The data can't be trained on.
        TrainingError: The run can't go on.
    """
    raise NotImplementedError


def plan(settings: RunSettings) -> dict[str, Any]:
    """Returns what `train` would do, for a dry run: reads and checks the data, loads no weights.

    Keys: `settings` (resolved), `data` (report), `labels`, `notes`.

    Raises:
        SettingsError: A setting can't be.
        DataError: The data can't be trained on.
    """
    raise NotImplementedError


def linear_probe(
    settings: RunSettings, *, watch: Watcher | None = None, overwrite: bool = False
) -> RunResult:
    """Trains a linear classifier on the frozen base's sentence vectors: the baseline to beat."""
    raise NotImplementedError


def evaluate(
    run_dir: str | Path, data: str | None = None, split: str = "test", *, batch_size: int = 32
) -> dict[str, Any]:
    """Returns the metrics of a run's adapter on its own split or on other data."""
    raise NotImplementedError


def predict(
    run_dir: str | Path,
    rows: Sequence[str | Mapping[str, Any]],
    batch_size: int = 32,
    *,
    base_only: bool = False,
    max_new_tokens: int = 128,
) -> list[dict[str, Any]]:
    """Returns an answer for each text or row, with a run's (or an adapter's) directory.

    Args:
        run_dir: A run's directory, or the directory of an adapter that a run made.
        rows: Texts, or rows with the columns that the task knows.
        batch_size: Rows computed at once; it doesn't change the answers.
        base_only: Answer with the untrained base instead (instructions only).
        max_new_tokens: Longest answer (instructions only).

    Returns:
        Classification: `{"text", "label", "score", "probabilities": {label: p}}`.
        Instructions: `{"messages", "answer"}`.
    """
    raise NotImplementedError
