"""Tagged words in columns, one word a line, as the CoNLL shared tasks wrote them.

-DOCSTART- -X- O O                a document begins: skipped
U.N. NNP B-ORG                    the first column is the word, the last one its tag
official NN O
                                  an empty line ends a sentence
"""

from __future__ import annotations

from typing import Any

from graftune.errors import DataError

_DOCUMENT = "-DOCSTART-"


def read_sentences(text: str, where: str) -> tuple[list[dict[str, Any]], list[int]]:
    """Returns each sentence's `words` and `tags`, and the line on which it begins.

    Columns are parted by tabs where a line has one, else by spaces.

    Raises:
        DataError: A line has no tag.
    """
    rows: list[dict[str, Any]] = []
    lines: list[int] = []
    row: dict[str, Any] | None = None
    for number, line in enumerate(text.split("\n"), start=1):
        columns = _columns(line)
        if not columns or columns[0] == _DOCUMENT:
            row = None
            continue
        if len(columns) < 2 or not columns[-1]:
            raise DataError(
                f'{where}:{number}: "{line.strip()}" has no tag: expected a word and its tag, with '
                "a tab or a space between them."
            )
        if row is None:
            row = {"words": [], "tags": []}
            rows.append(row)
            lines.append(number)
        row["words"].append(columns[0])
        row["tags"].append(columns[-1])
    return rows, lines


def _columns(line: str) -> list[str]:
    if "\t" in line and line.strip():
        return [column.strip() for column in line.rstrip("\r\n").split("\t")]
    return line.split()
