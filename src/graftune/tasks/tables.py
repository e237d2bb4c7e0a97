"""Rows from files: CSV, TSV, JSONL, JSON, Parquet, CoNLL, each row with the place it came from.

Only the standard library is needed for text; pyarrow is imported for Parquet alone.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from graftune.errors import DataError, nearest
from graftune.tasks.conll import read_sentences
from graftune.tasks.squad import questions_in

Row = dict[str, Any]

_LONGEST_FIELD = 2**31 - 1


@dataclass(frozen=True)
class Table:
    """Rows of one source, in order."""

    rows: list[Row]
    """Each row by column name."""
    source: str
    """The file's or data set's name, as the user knows it."""
    lines: list[int] | None = None
    """The line on which each row starts or ends, in a text file; else None."""

    @property
    def columns(self) -> list[str]:
        """The names of all columns, in the order in which they appear."""
        return list(dict.fromkeys(name for row in self.rows for name in row))

    def where(self, index: int) -> str:
        """Returns the place of a row: `mail.csv:12`, or `mail.parquet row 12`."""
        if self.lines is not None:
            return f"{self.source}:{self.lines[index]}"
        return f"{self.source} row {index + 1}"


def read_table(path: str | Path) -> Table:
    """Returns the rows of a CSV, TSV, JSONL, JSON, Parquet or CoNLL file.

    Raises:
        DataError: The file can't be read, has another ending, or is not what its ending says.
    """
    path = Path(path)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f'"{path}" ends in "{path.suffix}": expected one of {", ".join(_READERS)}.')
    try:
        table = reader(path)
    except UnicodeDecodeError as error:
        raise DataError(_encoding_message(path, error)) from None
    except OSError as error:
        raise DataError(f'"{path}" can\'t be read: {error.strerror or error}.') from error
    if not table.rows:
        raise DataError(f'"{path}" holds no rows.')
    return table


def readable_endings() -> list[str]:
    """Returns the endings of the files that `read_table` reads."""
    return list(_READERS)


def _read_delimited(path: Path) -> Table:
    text = _read_text(path)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else _delimiter(text)
    limit = csv.field_size_limit(_LONGEST_FIELD)
    try:
        return _delimited_rows(path, text, delimiter)
    finally:
        csv.field_size_limit(limit)


def _delimited_rows(path: Path, text: str, delimiter: str) -> Table:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: list[Row] = []
    lines: list[int] = []
    header: list[str] | None = None
    try:
        for fields in reader:
            if not fields:
                continue
            if header is None:
                header = _header(path, fields)
                continue
            if len(fields) != len(header):
                raise DataError(_ragged_message(path, reader.line_num, header, fields))
            rows.append(dict(zip(header, fields, strict=True)))
            lines.append(reader.line_num)
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: not valid CSV: {error}.") from None
    return Table(rows, str(path), lines)


def _header(path: Path, fields: Sequence[str]) -> list[str]:
    names = [field.strip() for field in fields]
    twice = sorted({name for name in names if names.count(name) > 1})
    if "" in names or twice:
        found = f"{twice[0]!r} twice" if twice else "a column without a name"
        raise DataError(f"{path}:1: the first line must name each column; it has {found}.")
    return names


def _delimiter(text: str) -> str:
    first = text.partition("\n")[0]
    return max(",;\t", key=lambda mark: (first.count(mark), mark == ","))


def _ragged_message(path: Path, line: int, header: list[str], fields: list[str]) -> str:
    return (
        f"{path}:{line}: this row has {len(fields)} fields, the first line names {len(header)} "
        f'({", ".join(header)}); put texts that hold the separator in "quotes".'
    )


def _read_json_lines(path: Path) -> Table:
    rows: list[Row] = []
    lines: list[int] = []
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        rows.append(_row(_parsed(line, f"{path}:{number}"), f"{path}:{number}"))
        lines.append(number)
    return Table(rows, str(path), lines)


def _read_json(path: Path) -> Table:
    value = _parsed(_read_text(path), str(path))
    if isinstance(value, dict):
        lists = [item for item in cast(Row, value).values() if isinstance(item, list)]
        value = lists[0] if len(lists) == 1 else value
    if isinstance(value, list):
        value = questions_in(cast(list[Any], value)) or cast(list[Any], value)
    if not isinstance(value, list):
        raise DataError(f"{path}: expected a list of objects, found {_kind(value)}.")
    items = cast(list[Any], value)
    rows = [_row(item, f"{path} row {number}") for number, item in enumerate(items, start=1)]
    return Table(rows, str(path))


def _read_conll(path: Path) -> Table:
    rows, lines = read_sentences(_read_text(path), str(path))
    return Table(rows, str(path), lines)


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(f"{where}: not valid JSON: {error}.") from None


def _row(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected an object like {{...}}, found {_kind(value)}.")
    return cast(Row, value)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", type(None): "null"}
    return names.get(type(value), f"{value!r}")


def _read_parquet(path: Path) -> Table:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except pyarrow.ArrowException as error:
        raise DataError(f'"{path}" is not a Parquet file: {error}.') from None
    names = _class_names(dict(table.schema.metadata or {}))
    rows = [name_classes(row, names) for row in table.to_pylist()]
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


def _read_text(path: Path) -> str:
    return path.read_bytes().decode("utf-8-sig")


def _encoding_message(path: Path, error: UnicodeDecodeError) -> str:
    line = error.object[: error.start].count(b"\n") + 1
    return (
        f"{path}:{line}: byte 0x{error.object[error.start]:02x} is not UTF-8; save the file as "
        f"UTF-8, for instance with `iconv -f latin1 -t utf-8`."
    )


def missing_file_message(path: Path) -> str:
    """Returns what to say about a path that isn't there, with the nearest that is."""
    folder = path.parent
    near = nearest(path.name, _names_in(folder)) if folder.is_dir() else ""
    return f'There is no file or folder "{path}".{near}'


def _names_in(folder: Path) -> Iterator[str]:
    return (item.name for item in folder.iterdir())


_READERS: dict[str, Callable[[Path], Table]] = {
    ".csv": _read_delimited,
    ".tsv": _read_delimited,
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".conll": _read_conll,
}
