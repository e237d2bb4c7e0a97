"""Hidden states on disk, by what they were computed from: appended, memory-mapped, safe to kill.

    FOLDER/states.bin     one record after another, raw
    FOLDER/index.jsonl    {"key", "at", "shape", "crc"} of each, written after its record
    FOLDER/lock           held by the run that writes; others only read

A run that is killed leaves at most a last record without its line, or half a line: both are left
out and written over. A record whose checksum is wrong counts as missing.
"""

from __future__ import annotations

import fcntl
import json
import math
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class Record(NamedTuple):
    """Where a record lies."""

    at: int
    shapes: tuple[tuple[int, ...], ...]
    crc: int

    @property
    def counts(self) -> list[int]:
        """Entries of each tensor."""
        return [math.prod(shape) for shape in self.shapes]

    def stop(self, dtype: torch.dtype) -> int:
        """Returns where it ends."""
        return self.at + sum(self.counts) * dtype.itemsize


class TrunkStore:
    """A folder of records, each a few tensors of one dtype.

    Args:
        folder: made if missing.
        dtype: of all tensors.
        limit: bytes that the records may take; None for no limit.
    """

    def __init__(self, folder: Path, dtype: torch.dtype, limit: int | None = None) -> None:
        self.folder, self.dtype, self.limit = folder, dtype, limit
        self.why_not: str | None = None
        """Why nothing more is written, or None."""
        folder.mkdir(parents=True, exist_ok=True)
        self._states, self._index = folder / "states.bin", folder / "index.jsonl"
        self._known: dict[str, Record] = {}
        self._checked: set[str] = set()
        self._end = 0
        self._map: np.ndarray[Any, np.dtype[np.uint8]] = np.zeros(0, np.uint8)
        self._lock = (folder / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.why_not = "another run writes to it"
        self._read_index()

    def __contains__(self, key: str) -> bool:
        return key in self._known

    def __len__(self) -> int:
        return len(self._known)

    @property
    def bytes(self) -> int:
        """How many the records take."""
        return self._end

    def get(self, key: str) -> list[Tensor] | None:
        """Returns the tensors of a record; None where there is none, or it is damaged.

        They lie in the memory-mapped file: copy what is to be written to.
        """
        record = self._known.get(key)
        if record is None:
            return None
        stop = record.stop(self.dtype)
        if stop > len(self._map):
            self._map = np.memmap(self._states, np.uint8, "c")
        raw = self._map[record.at : stop]
        if key not in self._checked:
            if len(raw) < stop - record.at or zlib.crc32(raw.tobytes()) != record.crc:
                del self._known[key]
                return None
            self._checked.add(key)
        flat = torch.from_numpy(raw).view(self.dtype)
        parts = flat.split(record.counts)
        return [part.view(shape) for part, shape in zip(parts, record.shapes, strict=True)]

    def put(self, key: str, tensors: list[Tensor]) -> None:
        """Writes a record, unless it is there, or nothing more can be written."""
        if self.why_not is not None or key in self._known:
            return
        flat = torch.cat([t.detach().to("cpu", self.dtype).flatten() for t in tensors])
        raw = flat.contiguous().view(torch.uint8).numpy().tobytes()
        if self.limit is not None and self._end + len(raw) > self.limit:
            self.why_not = f"its {self.limit:,} bytes are full"
            return
        record = Record(self._end, tuple(tuple(t.shape) for t in tensors), zlib.crc32(raw))
        line = json.dumps({"key": key, **record._asdict()}) + "\n"
        try:
            with self._states.open("r+b") as states:
                states.seek(self._end)
                states.write(raw)
            with self._index.open("a") as index:
                index.write(line)
        except OSError as error:  # a full disk: what is there can still be read
            self.why_not = f"it can't be written ({error.strerror})"
            return
        self._known[key] = record
        self._checked.add(key)
        self._end += len(raw)

    def close(self) -> None:
        """Lets others write."""
        self._lock.close()

    def _read_index(self) -> None:
        """Reads what is whole; a writer cuts off the rest, so that its lines follow whole ones."""
        self._states.touch()
        self._index.touch()
        size, whole = self._states.stat().st_size, 0
        for line in self._index.read_bytes().splitlines(keepends=True):
            record = _parsed(line)
            if record is None:
                break
            key, found = record
            stop = found.stop(self.dtype)
            if found.at != self._end or stop > size:
                break
            self._known[key], self._end = found, stop
            whole += len(line)
        if self.why_not is None:
            with self._index.open("r+b") as index:
                index.truncate(whole)


def _parsed(line: bytes) -> tuple[str, Record] | None:
    """Returns the key and place that a line of the index says; None of half a line."""
    try:
        said: dict[str, Any] = json.loads(line)
        shapes = tuple(tuple(shape) for shape in said["shapes"])
        return str(said["key"]), Record(int(said["at"]), shapes, int(said["crc"]))
    except (ValueError, KeyError, TypeError):
        return None
