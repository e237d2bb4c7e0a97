"""From settings to a trained adapter, its metrics and its predictions.

A run's directory holds `run.yaml` (the settings, every default filled in), `env.json`,
`metrics.jsonl`, `adapter/`, `beside/` (the adapters that it attends to), `checkpoints/`,
`predictions.test.jsonl`, `scores.test.jsonl` (how well each row was answered), `graftune_task.json`
(what prediction needs, also beside the adapter) and, last, `result.json`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftune.errors import DataError, SettingsError
from graftune.tasks.result import RunResult, Silent, Watcher
from graftune.tasks.settings import RunSettings

if TYPE_CHECKING:
    from graftune.tasks.data import Example
    from graftune.tasks.ensemble import Ensemble
    from graftune.tasks.in_context_run import InContextRun
    from graftune.tasks.task import Task
    from graftune.tasks.training_run import TrainingRun


def train(
    settings: RunSettings,
    *,
    watch: Watcher | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> RunResult:
    """Trains an adapter and returns what came of it; or measures prompts (`method: in-context`).

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
    return _prepared(settings, watch or Silent()).run(resume, overwrite)


def plan(settings: RunSettings) -> dict[str, Any]:
    """Returns what `train` would do, for a dry run: reads and checks the data, loads no weights.

    Keys: `settings` (resolved), `data` (report), `labels`, `total_steps`, `notes`, and for prompts
    `prompt`, the first question's.

    Raises:
        SettingsError: A setting can't be.
        DataError: The data can't be trained on.
    """
    return _prepared(settings, Silent()).plan()


def linear_probe(
    settings: RunSettings, *, watch: Watcher | None = None, overwrite: bool = False
) -> RunResult:
    """Trains a linear classifier on the frozen base's sentence vectors: the baseline to beat.

    The settings' method and training are ignored; the run is named `NAME-probe` unless it has a
    name or directory of its own.

    Raises:
        SettingsError: The task has no labels; or the run's directory is taken.
        DataError: The data can't be trained on.
    """
    from graftune.tasks.probe import run_probe

    return run_probe(settings, watch or Silent(), overwrite)


def evaluate(
    run_dir: str | Path,
    data: str | None = None,
    split: str = "test",
    *,
    batch_size: int = 32,
    drop: int | None = None,
    others: Sequence[str | Path] = (),
    vote: str | None = None,
) -> dict[str, Any]:
    """Returns the metrics of a run's adapter, or of several that vote, on held-out or other rows.

    Args:
        run_dir: A run's directory; with `data` also an adapter's.
        data: A file, folder or data set name; None for the data the run was made with.
        split: Which part of it.
        batch_size: Rows computed at once.
        drop: Lowest blocks in which the adapter is left out; None for what it was trained for.
        others: Directories of more adapters, which vote with the first one.
        vote: How: "majority" (if None) or "mean".

    Returns:
        `{"split", "rows", "metrics", "confusion", "labels", "classes"}`; of a vote also `vote` and
        `members`, each one's `{"path", "metrics"}`.

    Raises:
        FormatError: The directory is not a run's.
        DataError: The data can't be read, or has a label that the run doesn't know.
        SettingsError: The adapters can't vote together, or saw each other's held-out rows.
    """
    from graftune.tasks.ensemble import check_same_rows
    from graftune.tasks.predicting import Predictor

    loaded: Ensemble | Predictor
    if others or vote is not None:
        loaded = _ensemble(run_dir, others, vote, drop)
        if data is None:
            check_same_rows([run_dir, *others])
    else:
        loaded = Predictor.load(run_dir, drop=drop)
    task, ready = loaded.task, loaded.ready
    examples = _examples(Path(run_dir), data, split, task, loaded.columns)
    task.check_known(examples, ready.labels)
    more: dict[str, Any] = {}
    if isinstance(loaded, Predictor):
        found = loaded.measure(examples, batch_size)
    else:
        found, alone = loaded.measure(examples, batch_size)
        members = [{"path": path, "metrics": one.metrics} for path, one in alone.items()]
        more = {"vote": loaded.how, "members": members}
    return {
        "split": split,
        "rows": len(examples),
        "metrics": found.metrics,
        "confusion": found.confusion,
        "labels": ready.labels,
        "classes": found.classes,
        **more,
    }


def predict(
    run_dir: str | Path,
    rows: Sequence[str | Mapping[str, Any]],
    batch_size: int = 32,
    *,
    base_only: bool = False,
    max_new_tokens: int = 128,
    drop: int | None = None,
    others: Sequence[str | Path] = (),
    vote: str | None = None,
) -> list[dict[str, Any]]:
    """Returns an answer for each text or row, with a run's (or an adapter's) directory.

    Args:
        run_dir: A run's directory, or the directory of an adapter that a run made.
        rows: Texts, or rows with the columns that the task knows.
        batch_size: Rows computed at once.
        base_only: Answer with the untrained base instead (a language model, not a classifier); a
            prompt without its demonstrations.
        max_new_tokens: Longest answer (instructions only).
        drop: Lowest blocks in which the adapter is left out; None for what it was trained for.
        others: Directories of more adapters, which vote with the first one.
        vote: How: "majority" (if None) or "mean".

    Returns:
        Classification, choices: `{"text", "label", "score", "probabilities": {label: p}}`, of a
        vote each label's share of it, and `members`, what each member said.
        Instructions: `{"messages", "answer"}`.
        Regression: `{"text", "value"}`.
        Multilabel: `{"text", "labels": [labels], "probabilities": {label: p}}`.
        Labelling: `{"words", "tags", "entities": [{"type", "start", "end", "text", "score"}]}`.
        Spans: `{"question", "answer", "start", "end", "score", "best": [the same]}`.

    Raises:
        FormatError: The directory is not a finished run's or an adapter's.
        DataError: A row can't be asked; or `base_only` for a task whose base can't answer.
        SettingsError: The adapters can't vote together.
    """
    from graftune.tasks.predicting import Predictor, needs_adapter

    if others or vote is not None:
        if base_only:
            raise SettingsError("the base alone has no vote: leave base_only or the others out.")
        return _ensemble(run_dir, others, vote, drop).predict(rows, batch_size)
    if base_only and needs_adapter(Path(run_dir)):
        raise DataError(
            "The base alone can't answer with labels: its head is new. Compare with linear_probe."
        )
    predictor = Predictor.load(run_dir, base_only=base_only, drop=drop)
    return predictor.predict(rows, batch_size, max_new_tokens=max_new_tokens)


def _ensemble(
    run_dir: str | Path, others: Sequence[str | Path], vote: str | None, drop: int | None
) -> Ensemble:
    from graftune.tasks.ensemble import Ensemble

    return Ensemble.load([run_dir, *others], vote or "majority", drop=drop)


def _prepared(settings: RunSettings, watcher: Watcher) -> TrainingRun | InContextRun:
    """Returns the run that settings ask for, checked."""
    from graftune.tasks.in_context import is_in_context

    if is_in_context(settings.method):
        from graftune.tasks.in_context_run import InContextRun

        return InContextRun.prepared(settings, watcher)
    from graftune.tasks.training_run import TrainingRun

    return TrainingRun.prepared(settings, watcher)


def _examples(
    run_dir: Path, data: str | None, split: str, task: Task, columns: Mapping[str, str]
) -> list[Example]:
    """Returns the examples of a run's own split, or of other data with the same columns."""
    from graftune.tasks.columns import check_columns
    from graftune.tasks.data import load
    from graftune.tasks.sources import read_split
    from graftune.tasks.workspace import read_settings

    if data is None:
        splits = load(read_settings(run_dir).data, task).splits
        if split not in splits:
            raise DataError(f"The run has no {split} split: it has {', '.join(splits)}.")
        return splits[split]
    table = read_split(data, split)
    check_columns(table, dict(columns))
    return task.examples(table, columns)
