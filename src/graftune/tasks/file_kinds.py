"""What a file really is, whatever its ending says, and in which encoding it was written."""

from __future__ import annotations

import codecs
import json
from pathlib import Path

from graftune.errors import DataError

_HEAD = 65536
"""Bytes that are looked at."""
_MARKS = {
    b"PAR1": ("a Parquet file", ".parquet"),
    b"PK\x03\x04": ("a ZIP archive or an Excel sheet", ""),
    b"\xd0\xcf\x11\xe0": ("an old Excel sheet", ""),
    b"\x1f\x8b": ("packed with gzip", ""),
    b"\x28\xb5\x2f\xfd": ("packed with zstd", ""),
    b"version https://git-lfs": ("a Git LFS pointer, not the data: run `git lfs pull`", ""),
    b"ARROW1": ("an Arrow file", ""),
}
_WIDE = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_MANY_ZEROS = 0.2
"""Share of zero bytes beyond which a text must be of two bytes a letter."""


def check_kind(path: Path) -> None:
    """Checks that a file isn't plainly something else than its ending says.

    Raises:
        DataError: It is empty, of another format, or not in UTF-8.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD)
    if not head.strip():
        raise DataError(f'"{path}" holds no rows: the file is empty.')
    ending = path.suffix.lower()
    for mark, (kind, right) in _MARKS.items():
        if head.startswith(mark) and ending != right:
            raise DataError(f'"{path}" is {kind}, whatever its ending says.{_advice(path, right)}')
    if ending == ".parquet":
        return
    wide = wide_encoding(head)
    if wide is not None:
        raise DataError(
            f"{path}:1: the text is in {wide.upper()}; save it as UTF-8, for instance with "
            f"`iconv -f {wide} -t utf-8`."
        )
    _check_text(path, ending, head.removeprefix(codecs.BOM_UTF8).lstrip())


def wide_encoding(head: bytes) -> str | None:
    """Returns the name of an encoding of two or four bytes a letter, None where it is none.

    Example:
        >>> wide_encoding("text,label".encode("utf-16")), wide_encoding(b"text,label")
        ('utf-16', None)
    """
    for mark, name in _WIDE.items():
        if head.startswith(mark):
            return name
    even, odd = head[::2].count(0), head[1::2].count(0)
    if even + odd < len(head) * _MANY_ZEROS:
        return None
    return "utf-16le" if odd > even else "utf-16be"


def encoding_message(path: Path) -> str:
    """Returns what to say of a file that isn't UTF-8: line, byte, and what it likely is."""
    data = path.read_bytes()
    try:
        data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        at = error.start + (len(codecs.BOM_UTF8) if data.startswith(codecs.BOM_UTF8) else 0)
        line = data[:at].count(b"\n") + 1
        likely = "windows-1252" if any(0x80 <= byte <= 0x9F for byte in data) else "latin1"
        return (
            f"{path}:{line}: byte 0x{data[at]:02x} is not UTF-8; it is likely {likely}: save the "
            f"file as UTF-8, for instance with `iconv -f {likely} -t utf-8`."
        )
    return f"{path}: changed while it was read."


def _check_text(path: Path, ending: str, head: bytes) -> None:
    if head[:14].lower().startswith((b"<!doctype html", b"<html")):
        raise DataError(f'"{path}" is a web page, whatever its ending says.')
    is_list = head.startswith(b"[")
    if ending in (".jsonl", ".ndjson") and (is_list or head.split(None, 2)[:1] == [b"{"]):
        if is_list and _is_json(head.partition(b"\n")[0]):
            return  # a list on a line: the row's own error says it better
        raise DataError(
            f'"{path}" holds one JSON value over several lines, not one object a '
            f"line.{_advice(path, '.json')}"
        )
    lines = head.split(b"\n", 2)
    if ending in (".csv", ".tsv") and head.startswith(b"{") and _is_json(lines[0]):
        raise DataError(f'"{path}" holds JSON objects, one a line.{_advice(path, ".jsonl")}')
    follows = len(lines) > 1 and lines[1].lstrip().startswith(b"{")
    if ending == ".json" and follows and _is_json(lines[0]):
        raise DataError(f'"{path}" holds JSON objects, one a line.{_advice(path, ".jsonl")}')
    if ending in (".jsonl", ".ndjson") and head[:1].isalpha() and b"," in lines[0]:
        raise DataError(f'"{path}" holds no JSON, but looks like CSV.{_advice(path, ".csv")}')


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _advice(path: Path, ending: str) -> str:
    return f" Rename it {path.stem}{ending}." if ending else ""
