"""A run's directory: whose it is, what lies in it, and how it is written.

Each file is written beside its place and renamed, so it is the old one or the new one, whole.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from graftune import processes
from graftune.errors import DataError, FormatError, SettingsError
from graftune.formats.atomic import locked
from graftune.tasks.settings import RunSettings

SETTINGS = "run.yaml"
ENVIRONMENT = "env.json"
LOG = "metrics.jsonl"
ADAPTER = "adapter"
BESIDE = "beside"
CHECKPOINTS = "checkpoints"
PREDICTIONS = "predictions.test.jsonl"
SCORES = "scores.test.jsonl"
RESULT = "result.json"
PROMPT = "prompt.json"
"""In the adapter's directory of a run that trained nothing: what its prompts are made of."""
TASK = "graftune_task.json"
"""What prediction needs besides the adapter; in the run's directory and in the adapter's."""

OWN = (
    *(SETTINGS, ENVIRONMENT, LOG, ADAPTER, BESIDE, CHECKPOINTS, PREDICTIONS, SCORES, RESULT, TASK),
    "report.html",
)

_LIBRARIES = ("graftune", "torch", "transformers", "tokenizers", "accelerate", "numpy")
_TASK_KEYS = ("task", "base", "labels", "max_length", "columns", "chat_template", "precision")


@contextlib.contextmanager
def claimed(run_dir: Path, *, resume: bool = False, overwrite: bool = False) -> Iterator[None]:
    """Makes a run's directory and holds it while the block runs.

    Raises:
        SettingsError: It holds another run (unless resumed or overwritten) or foreign files.
        FormatError: Another process is writing it.
    """
    if run_dir.exists() and not run_dir.is_dir():
        raise SettingsError(f'"{run_dir}" is a file; a run needs a directory (out).')
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    with locked(run_dir, timeout_s=0):
        check_free(run_dir, resume=resume, overwrite=overwrite)
        run_dir.mkdir(exist_ok=True)
        if not resume:
            clear(run_dir)
        yield


def check_free(run_dir: Path, *, resume: bool, overwrite: bool) -> None:
    """Checks that a run may write into a directory.

    Raises:
        SettingsError: It holds another run, or files that aren't a run's.
    """
    if not run_dir.exists() or not any(run_dir.iterdir()):
        return
    if not (run_dir / SETTINGS).exists():
        names = ", ".join(sorted(item.name for item in run_dir.iterdir())[:3])
        raise SettingsError(
            f'"{run_dir}" holds files that are not a run\'s ({names}); choose another directory '
            "(out) or name."
        )
    worth_keeping = (run_dir / RESULT).exists() or any((run_dir / CHECKPOINTS).glob("*"))
    if worth_keeping and not (resume or overwrite):
        raise SettingsError(
            f'"{run_dir}" holds a run already: resume it, overwrite it, or choose another '
            "directory (out) or name."
        )


def clear(run_dir: Path) -> None:
    """Removes what an earlier run wrote; files that aren't a run's stay."""
    for name in OWN:
        path = run_dir / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all; of several processes the first one writes.

    Raises:
        FormatError: The disk is full or the place can't be written.
    """
    if not processes.is_first():
        return
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise FormatError(f'"{path}" can\'t be written: {error.strerror or error}.') from error
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Writes a value as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes one JSON object a line, whole or not at all."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_scores(run_dir: Path, scores: Iterable[float]) -> None:
    """Writes how well each test row was answered, unless that isn't known."""
    rows = [{"score": score} for score in scores]
    if rows:
        write_lines(run_dir / SCORES, rows)


def read_settings(run_dir: Path) -> RunSettings:
    """Returns the settings that a run was made with.

    Raises:
        FormatError: The directory is not a run's.
    """
    if not (run_dir / SETTINGS).is_file():
        raise FormatError(f'"{run_dir}" is not a run\'s directory: it has no {SETTINGS}.')
    return RunSettings.from_yaml(run_dir / SETTINGS)


def read_task(directory: Path) -> dict[str, Any]:
    """Returns what a run's or an adapter's directory says about predicting with it.

    Raises:
        FormatError: It says nothing, or something that can't be read.
    """
    path = directory / TASK
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        what = "is not there" if not directory.exists() else f"has no {TASK}"
        raise FormatError(
            f'"{directory}" {what}: give the directory of a finished run, or of its adapter.'
        ) from None
    except (OSError, ValueError) as error:
        raise FormatError(f'"{path}" can\'t be read: {error}.') from error
    missing = [key for key in _TASK_KEYS if not isinstance(found, dict) or key not in found]
    if missing:
        raise FormatError(f'"{path}" lacks {", ".join(missing)}.')
    return found


def environment(hashes: Mapping[str, str]) -> dict[str, Any]:
    """Returns what a run took place in: versions, machine, command, data."""
    return {
        "versions": versions(),
        "platform": platform.platform(),
        "command": sys.argv,
        "data": dict(hashes),
    }


def check_same_data(run_dir: Path, hashes: Mapping[str, str]) -> None:
    """Checks that the data files are those that a run was begun with.

    Raises:
        DataError: One has changed, come or gone.
    """
    path = run_dir / ENVIRONMENT
    before = json.loads(path.read_text(encoding="utf-8"))["data"] if path.exists() else hashes
    changed = [name for name in {**before, **hashes} if before.get(name) != hashes.get(name)]
    if changed:
        raise DataError(
            f'"{changed[0]}" is not what it was when the run was begun, so it can\'t be resumed; '
            "start another one."
        )


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the libraries that a run depends on."""
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def size_of(directory: Path) -> int:
    """Returns the bytes of all files below a directory."""
    return sum(item.stat().st_size for item in directory.rglob("*") if item.is_file())
