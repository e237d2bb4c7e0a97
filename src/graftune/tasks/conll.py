"""Tagged words in columns, one word a line, as the CoNLL shared tasks wrote them.

-DOCSTART- -X- O O                a document begins: skipped
U.N. NNP B-ORG                    the first column is the word, the last one its tag
official NN O
                                  an empty line ends a sentence
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from graftune.tasks.bad_rows import BadRows, refuse

_DOCUMENT = "-DOCSTART-"


def read_sentences(
    text: str | Iterable[str], where: str, bad: BadRows | None = None
) -> tuple[list[dict[str, Any]], list[int]]:
    """Returns each sentence's `words` and `tags`, and the line on which it begins.

    Columns are parted by tabs where a line has one, else by spaces. Of a sentence with a bad line
    nothing is kept.

    Raises:
        DataError: A line has no tag, and `bad` is None.
    """
    rows: list[dict[str, Any]] = []
    lines: list[int] = []
    row: dict[str, Any] | None = None
    is_bad = False
    for number, line in enumerate(text.split("\n") if isinstance(text, str) else text, start=1):
        columns = _columns(line)
        if not columns or columns[0] == _DOCUMENT:
            row, is_bad = None, False
            continue
        if is_bad:
            continue
        if len(columns) < 2 or not columns[-1] or "\0" in line:
            refuse(bad, f"{where}:{number}", _fault(line))
            if row is not None:
                rows.pop()
                lines.pop()
            row, is_bad = None, True
            continue
        if row is None:
            row = {"words": [], "tags": []}
            rows.append(row)
            lines.append(number)
        row["words"].append(columns[0])
        row["tags"].append(columns[-1])
    return rows, lines


def _fault(line: str) -> str:
    if "\0" in line:
        return "the line holds a NUL byte, which no text does: the file is damaged."
    return (
        f'"{line.strip()}" has no tag: expected a word and its tag, with a tab or a space between '
        "them."
    )


def _columns(line: str) -> list[str]:
    if "\t" in line and line.strip():
        return [column.strip() for column in line.rstrip("\r\n").split("\t")]
    return line.split()
