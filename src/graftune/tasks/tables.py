"""Rows from files: CSV, TSV, JSONL, JSON, Parquet, CoNLL, each row with the place it came from.

Only the standard library is needed for text; pyarrow is imported for Parquet alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from sys import intern
from typing import Any, cast

from graftune.errors import DataError, nearest
from graftune.tasks.bad_rows import BadRows, refuse
from graftune.tasks.conll import read_sentences
from graftune.tasks.delimited import read_delimited
from graftune.tasks.file_kinds import check_kind, encoding_message
from graftune.tasks.squad import questions_in

Row = dict[str, Any]
_GONE: Row = {}


@dataclass(frozen=True)
class Table:
    """Rows of one source, in order."""

    rows: list[Row]
    """Each row by column name."""
    source: str
    """The file's or data set's name, as the user knows it."""
    lines: list[int] | None = None
    """The line on which each row starts or ends, in a text file; else None."""
    numbers: list[int] | None = None
    """The number of each row where some were left out; None: counted from 1."""

    @cached_property
    def columns(self) -> list[str]:
        """The names of all columns, in the order in which they appear."""
        return list(dict.fromkeys(name for row in self.rows for name in row))

    def where(self, index: int) -> str:
        """Returns the place of a row: `mail.csv:12`, or `mail.parquet row 12`."""
        if self.lines is not None:
            return f"{self.source}:{self.lines[index]}"
        number = index + 1 if self.numbers is None else self.numbers[index]
        return f"{self.source} row {number}"

    def alone(self, index: int) -> Table:
        """Returns a table of one row, which keeps its place."""
        return self._part(index, index + 1)

    def taken(self, size: int) -> Iterator[Table]:
        """Yields tables of so many rows, which are gone from this one, each with its place."""
        for start in range(0, len(self.rows), size):
            part = self._part(start, start + size)
            self.rows[start : start + size] = [_GONE] * len(part.rows)
            yield part

    def _part(self, start: int, stop: int) -> Table:
        rows = self.rows[start:stop]
        if self.lines is not None:
            return Table(rows, self.source, self.lines[start:stop])
        numbers = self.numbers
        kept = range(start + 1, stop + 1) if numbers is None else numbers[start:stop]
        return Table(rows, self.source, numbers=list(kept))


def read_table(path: str | Path, bad: BadRows | None = None) -> Table:
    """Returns the rows of a CSV, TSV, JSONL, JSON, Parquet or CoNLL file, or a text's paragraphs.

    Args:
        path: The file.
        bad: Where rows that can't be read are counted; None: they are errors.

    Raises:
        DataError: The file can't be read, has another ending, or is not what its ending says.
    """
    path = Path(path)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f'"{path}" ends in "{path.suffix}": expected one of {", ".join(_READERS)}.')
    try:
        check_kind(path)
        table = reader(path, bad)
    except UnicodeDecodeError:
        raise DataError(encoding_message(path)) from None
    except OSError as error:
        raise DataError(f'"{path}" can\'t be read: {error.strerror or error}.') from error
    if not table.rows:
        raise DataError(f'"{path}" holds no rows{_all_bad(bad)}.')
    return table


def _all_bad(bad: BadRows | None) -> str:
    if bad is None or not bad.count:
        return ""
    reason, place = next(iter(bad.places.items()))
    return f" that can be used: {bad.count} are bad, the first at {place}: {reason.rstrip('.')}"


def readable_endings() -> list[str]:
    """Returns the endings of the files that `read_table` reads."""
    return list(_READERS)


def _read_delimited(path: Path, bad: BadRows | None) -> Table:
    rows, lines = read_delimited(path, bad)
    return Table(cast(list[Row], rows), str(path), lines)


def _read_json_lines(path: Path, bad: BadRows | None) -> Table:
    rows: list[Row] = []
    lines: list[int] = []
    # A lone carriage return ends a line too: within a JSON text it can't stand.
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                rows.append(_row(_parsed(line.rstrip("\n"))))
            except DataError as error:
                refuse(bad, f"{path}:{number}", str(error))
            else:
                lines.append(number)
    return Table(rows, str(path), lines)


def _read_json(path: Path, bad: BadRows | None) -> Table:
    try:
        value = _parsed(path.read_text(encoding="utf-8-sig"))
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    if isinstance(value, dict):
        value = _only_list(cast(Row, value), path)
    if isinstance(value, list):
        value = questions_in(cast(list[Any], value)) or cast(list[Any], value)
    if not isinstance(value, list):
        raise DataError(f"{path}: expected a list of objects, found {_kind(value)}.")
    rows: list[Row] = []
    numbers: list[int] = []
    for number, item in enumerate(cast(list[Any], value), start=1):
        try:
            rows.append(_row(item))
        except DataError as error:
            refuse(bad, f"{path} row {number}", str(error))
        else:
            numbers.append(number)
    return Table(rows, str(path), numbers=numbers)


def _only_list(value: Row, path: Path) -> list[Any]:
    lists = {key: item for key, item in value.items() if isinstance(item, list)}
    if len(lists) == 1:
        return next(iter(lists.values()))
    found = ", ".join(f'"{key}"' for key in list(value)[:8]) or "nothing"
    raise DataError(
        f"{path}: expected a list of objects, found an object with {found}, of which "
        f"{len(lists) or 'none'} {'are lists' if lists else 'is a list'}: write the rows as "
        "[{…}, {…}], each split in a file of its own."
    )


def _read_conll(path: Path, bad: BadRows | None) -> Table:
    with path.open(encoding="utf-8-sig") as file:
        rows, lines = read_sentences(file, str(path), bad)
    return Table(rows, str(path), lines)


def _read_text(path: Path, bad: BadRows | None) -> Table:
    """Returns the paragraphs of a text, between empty lines, and the line on which each begins."""
    rows: list[Row] = []
    lines: list[int] = []
    paragraph: list[str] = []
    text = path.read_text(encoding="utf-8-sig")
    for number, line in enumerate([*text.splitlines(), ""], start=1):
        if line.strip():
            paragraph.append(line)
        elif paragraph:
            lines.append(number - len(paragraph))
            rows.append({"text": "\n".join(paragraph)})
            paragraph = []
    return Table(rows, str(path), lines)


def _parsed(text: str) -> Any:
    try:
        value = _DECODER.decode(text)
    except RecursionError:
        raise DataError("not usable JSON: it is nested too deeply.") from None
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise DataError(f"not valid JSON: {error.msg} ({line}column {error.colno}).") from None
    if "\\ud" in text or "\\uD" in text:
        _check_surrogates(value)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> Row:
    row = {intern(name): value for name, value in pairs}  # else each row has keys of its own
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f'the object has the key "{twice}" twice.')
    return row


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def _check_surrogates(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        found = f"\\u{ord(error.object[error.start]):04x}"
        raise DataError(f"a text holds {found}, half of a letter: it was cut.") from None


def _row(value: Any) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"expected an object like {{...}}, found {_kind(value)}.")
    return cast(Row, value)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", type(None): "null"}
    return names.get(type(value), f"{value!r}")


def _read_parquet(path: Path, bad: BadRows | None) -> Table:
    import pyarrow
    import pyarrow.parquet

    rows: list[Row] = []
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            if len(set(schema.names)) < len(schema.names):
                raise DataError(f'"{path}" has two columns of one name: {", ".join(schema.names)}.')
            names = _class_names(dict(schema.metadata or {}))
            for batch in file.iter_batches():
                rows.extend(name_classes(row, names) for row in batch.to_pylist())
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).rstrip(".")
        raise DataError(f'"{path}" is not a Parquet file, or not a whole one: {reason}.') from None
    return Table(rows, str(path))


def name_classes(row: Row, names: Mapping[str, list[str]]) -> Row:
    """Returns a row with the numbers of `ClassLabel` columns replaced by the classes' names.

    So are the numbers in columns of lists of them.
    """
    changed = {
        column: _named(row[column], classes) for column, classes in names.items() if column in row
    }
    return {**row, **changed}


def _named(value: Any, classes: Sequence[str]) -> Any:
    if isinstance(value, list):
        return [_named(item, classes) for item in cast(list[Any], value)]
    return classes[value] if isinstance(value, int) and 0 <= value < len(classes) else value


def class_names(feature: Any) -> list[str] | None:
    """Returns the names of a `ClassLabel`, or of a list of them, as `datasets` describes it."""
    given = cast(Mapping[str, Any], feature).get if isinstance(feature, Mapping) else None
    look = given or (lambda name: getattr(feature, name, None))
    names, inner = look("names"), look("feature")
    return list(names) if names else class_names(inner) if inner is not None else None


def _class_names(metadata: Mapping[bytes, bytes]) -> dict[str, list[str]]:
    """Returns the class names that `datasets` keeps in a Parquet file's metadata."""
    kept = metadata.get(b"huggingface")
    features = json.loads(kept).get("info", {}).get("features", {}) if kept else {}
    found = {column: class_names(feature) for column, feature in features.items()}
    return {column: names for column, names in found.items() if names}


def missing_file_message(path: Path) -> str:
    """Returns what to say about a path that isn't there, with the nearest that is."""
    folder = path.parent
    near = nearest(path.name, _names_in(folder)) if folder.is_dir() else ""
    return f'There is no file or folder "{path}".{near}'


def _names_in(folder: Path) -> Iterator[str]:
    return (item.name for item in folder.iterdir())


_READERS: dict[str, Callable[[Path, BadRows | None], Table]] = {
    ".csv": _read_delimited,
    ".tsv": _read_delimited,
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".conll": _read_conll,
    ".txt": _read_text,
}
