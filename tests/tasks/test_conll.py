from pathlib import Path

import pytest

from graftune.errors import DataError
from graftune.tasks.tables import read_table

OLD = "-DOCSTART- -X- O O\n\nU.N. NNP B-ORG\nofficial NN O\n\n\nBaghdad NNP B-LOC\n"


def file(folder: Path, text: str) -> Path:
    path = folder / "a.conll"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_last_column_is_the_tag_and_documents_are_skipped(tmp_path: Path) -> None:
    table = read_table(file(tmp_path, OLD))
    assert table.rows == [
        {"words": ["U.N.", "official"], "tags": ["B-ORG", "O"]},
        {"words": ["Baghdad"], "tags": ["B-LOC"]},
    ]
    assert table.where(1).endswith("a.conll:7")


def test_words_may_hold_spaces_where_tabs_part_columns(tmp_path: Path) -> None:
    table = read_table(file(tmp_path, "New York\tB-place\r\n \t \r\nO'Hare\tO\r\n"))
    assert [row["words"] for row in table.rows] == [["New York"], ["O'Hare"]]
    assert [row["tags"] for row in table.rows] == [["B-place"], ["O"]]


@pytest.mark.parametrize("line", ["word", "word\t"])
def test_a_word_without_a_tag_is_refused_with_its_line(tmp_path: Path, line: str) -> None:
    with pytest.raises(DataError, match=r'a\.conll:2: "word" has no tag'):
        read_table(file(tmp_path, f"a O\n{line}\n"))
