"""What a comparison has finished: a line of JSON for each run, appended and synced.

A line that a crash tore is passed over, and the next one begins on a line of its own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from graftune.errors import FormatError
from graftune.tasks.workspace import PREDICTIONS, SCORES

FILE = "results.jsonl"
Status = Literal["done", "failed", "left out"]


@dataclass(frozen=True, kw_only=True)
class Record:
    """How one run ended."""

    key: str
    """The fingerprint of its settings and data."""
    label: str
    seed: int
    lr: float | None = None
    multiple: float | None = None
    """Of a trial: of the method's learning rate."""
    status: Status
    why: str = ""
    """Why it failed or was left out, in a sentence."""
    memory_bytes: int | None = None
    """The run's own peak, above what its process held before."""
    seconds: float = 0.0
    """Wall time."""
    result: dict[str, Any] = field(default_factory=dict[str, Any])
    """`RunResult.to_dict()` of a run that is done."""

    @property
    def is_done(self) -> bool:
        """Whether there is a result."""
        return self.status == "done"

    @property
    def right(self) -> list[bool]:
        """Whether each test row was answered right; [] where rows aren't right or wrong."""
        return [row["label"] == row["true"] for row in self.answers]

    @property
    def scores(self) -> list[float]:
        """How well each test row was answered, more is better; [] where that isn't known."""
        path = self._written(SCORES)
        if path is None:  # a run of an earlier version
            return [float(right) for right in self.right]
        return [float(row["score"]) for row in _rows(path)]

    @property
    def answers(self) -> list[dict[str, Any]]:
        """The test rows with a right label and the label that was answered; [] without."""
        path = self._written(PREDICTIONS)
        rows = _rows(path) if path is not None else []
        picked = all("label" in row and isinstance(row.get("true"), str) for row in rows)
        return rows if picked else []

    def _written(self, name: str) -> Path | None:
        """Returns a file of the run's directory; None where there is none."""
        folder = self.result.get("run_dir")
        path = Path(str(folder)) / name
        return path if folder and path.is_file() else None


class Results:
    """The records of a comparison's folder, the last of each key."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self._records: dict[str, Record] = {}
        self._is_torn = False
        for line in self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else ():
            self._is_torn = not line.endswith(b"\n")
            found = _parsed(line)
            if found is not None:
                self._records[found.key] = found

    def get(self, key: str) -> Record | None:
        """Returns a run's record; None of one that isn't finished."""
        return self._records.get(key)

    def add(self, record: Record) -> None:
        """Appends a record, on the disk when this returns.

        Raises:
            FormatError: It can't be written.
        """
        text = json.dumps(asdict(record), ensure_ascii=False) + "\n"
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(("\n" if self._is_torn else "") + text)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise FormatError(f'"{self.path}" can\'t be written: {error.strerror}.') from error
        self._is_torn = False
        self._records[record.key] = record


def _rows(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]


def _parsed(line: bytes) -> Record | None:
    try:
        said: Mapping[str, Any] = json.loads(line)
        return Record(**said)
    except (ValueError, TypeError):
        return None
