"""CSV and TSV, read line by line, so that a fault is found where it begins and costs one line."""

from __future__ import annotations

import csv
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

from graftune.errors import DataError
from graftune.tasks.bad_rows import BadRows, refuse

_LONGEST_FIELD = 2**31 - 1
_NEVER_CLOSED = "unexpected end of data"


class _Lines:
    """A file's lines, those of the last record given out again where that record was no good."""

    def __init__(self, lines: Iterator[str]) -> None:
        self._lines = lines
        self._again: deque[str] = deque()
        self._record: list[str] = []
        self.number = 0
        """The number of the line that was given out last."""

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._again.popleft() if self._again else next(self._lines)
        self.number += 1
        self._record.append(line)
        return line

    def begin(self) -> int:
        """Forgets the last record; returns the number of the line on which the next one begins."""
        self._record.clear()
        return self.number + 1

    def back_to_second(self) -> None:
        """Goes back to the second line of the record that was begun."""
        rest = self._record[1:]
        self._again.extendleft(reversed(rest))
        self.number -= len(rest)


def read_delimited(
    path: Path, bad: BadRows | None = None
) -> tuple[list[dict[str, str]], list[int]]:
    """Returns the rows of a CSV or TSV file by column name, and the line on which each ends.

    Raises:
        DataError: The first line doesn't name the columns; or a row can't be read and `bad` is
            None.
    """
    limit = csv.field_size_limit(_LONGEST_FIELD)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return _rows(path, _Lines(iter(file)), bad)
    finally:
        csv.field_size_limit(limit)


def _rows(path: Path, lines: _Lines, bad: BadRows | None) -> tuple[list[dict[str, str]], list[int]]:
    reader, header = _reader_and_header(path, lines)
    rows: list[dict[str, str]] = []
    numbers: list[int] = []
    while True:
        start = lines.begin()
        try:
            fields = next(reader, None)
        except csv.Error as error:
            refuse(bad, f"{path}:{start}", _fault(str(error), start, lines.number))
            lines.back_to_second()
            continue
        if fields is None:
            return rows, numbers
        if len(fields) == len(header) and not any("\0" in field for field in fields):
            rows.append(dict(zip(header, fields, strict=True)))
            numbers.append(lines.number)
        elif fields:
            refuse(bad, f"{path}:{lines.number}", _unusable(header, fields))


def _reader_and_header(path: Path, lines: _Lines) -> tuple[Iterator[list[str]], list[str]]:
    first = next((line for line in lines if line.strip("\r\n")), "")
    at = lines.number
    lines.begin()
    delimiter = _delimiter(path, first)
    fields = next(csv.reader([first], delimiter=delimiter), [])
    names = [field.strip() for field in fields]
    twice = sorted({name for name in names if names.count(name) > 1})
    if names and ("" in names or twice):
        found = f"{twice[0]!r} twice" if twice else "a column without a name"
        raise DataError(f"{path}:{at}: the first line must name each column; it has {found}.")
    return csv.reader(lines, delimiter=delimiter, strict=True), names


def _delimiter(path: Path, first: str) -> str:
    if path.suffix.lower() != ".tsv":
        return max(",;\t", key=lambda mark: (first.count(mark), mark == ","))
    if "\t" not in first and "," in first:
        raise DataError(
            f"{path}:1: the first line holds no tab, but commas: if these part the columns, rename "
            f"it {path.stem}.csv."
        )
    return "\t"


def _fault(message: str, start: int, end: int) -> str:
    if message == _NEVER_CLOSED:
        return "not valid CSV: a quotation mark that begins here is never closed."
    said = f"not valid CSV: {message}"
    if end > start:
        said += f" on line {end}: a quotation mark on line {start} is closed there only"
    return f'{said}; inside quotes write a quotation mark twice ("").'


def _unusable(header: Sequence[str], fields: Sequence[str]) -> str:
    if len(fields) == len(header):
        return "the row holds a NUL byte, which no text does: the file is damaged."
    names = ", ".join(header)
    return (
        f"this row has {len(fields)} fields, the first line names {len(header)} ({names}); put "
        'texts that hold the separator in "quotes".'
    )
