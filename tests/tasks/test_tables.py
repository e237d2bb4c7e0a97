import json
from pathlib import Path

import pytest

from graftune.errors import DataError
from graftune.tasks.tables import Table, read_table


def file(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_csv_keeps_quotes_separators_and_line_breaks(tmp_path: Path) -> None:
    table = read_table(file(tmp_path, "a.csv", 'text,label\n"a, ""b""",x\n"two\nlines",y\n'))
    assert [row["text"] for row in table.rows] == ['a, "b"', "two\nlines"]
    assert table.where(1).endswith("a.csv:4")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "\ufefftext,label\nhello,x\n"),
        ("a.csv", "text;label\nhello;x\n"),
        ("a.tsv", "text\tlabel\r\nhello\tx\r\n"),
        ("a.jsonl", '{"text": "hello", "label": "x"}\n\n'),
        ("a.json", '{"version": 1, "rows": [{"text": "hello", "label": "x"}]}'),
    ],
)
def test_each_format_gives_the_same_row(tmp_path: Path, name: str, content: str) -> None:
    assert read_table(file(tmp_path, name, content)).rows == [{"text": "hello", "label": "x"}]


def test_lists_of_class_numbers_become_lists_of_names(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet is read with pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet", reason="Parquet is read with pyarrow")
    inner = {"names": ["O", "B-x"], "_type": "ClassLabel"}
    features = {"ner_tags": {"feature": inner, "_type": "List"}}
    kept = {"huggingface": json.dumps({"info": {"features": features}})}
    table = pyarrow.table({"ner_tags": [[0, 1], []]}).replace_schema_metadata(kept)
    parquet.write_table(table, tmp_path / "a.parquet")
    rows = read_table(tmp_path / "a.parquet").rows
    assert [row["ner_tags"] for row in rows] == [["O", "B-x"], []]


def test_parquet_class_numbers_become_names(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet is read with pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet", reason="Parquet is read with pyarrow")
    features = {"label": {"names": ["no", "yes"], "_type": "ClassLabel"}}
    kept = {"huggingface": json.dumps({"info": {"features": features}})}
    table = pyarrow.table({"text": ["a", "b"], "label": [1, 0]}).replace_schema_metadata(kept)
    parquet.write_table(table, tmp_path / "a.parquet")
    assert [row["label"] for row in read_table(tmp_path / "a.parquet").rows] == ["yes", "no"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", "text,label\na,b,c\n", "a.csv:2: this row has 3 fields, the first line names 2"),
        ("a.csv", "text,text\na,b\n", "a.csv:1: the first line must name each column"),
        ("a.csv", "text,\na,b\n", "a column without a name"),
        ("a.csv", b"text,label\ncaf\xe9,b\n", "a.csv:2: byte 0xe9 is not UTF-8"),
        ("a.csv", 'text,label\n"abc,b\n', "a.csv:2: not valid CSV"),
        ("a.csv", "", "holds no rows"),
        ("a.csv", "text,label\n", "holds no rows"),
        ("a.jsonl", '{"a": 1}\n\n{"a":\n', "a.jsonl:3: not valid JSON"),
        ("a.jsonl", "[1]\n", "a.jsonl:1: expected an object like {...}, found a list"),
        ("a.json", '"x"', "expected a list of objects, found a text"),
        ("a.parquet", "x", "is not a Parquet file"),
        ("a.docx", "x", 'ends in ".docx": expected one of .csv'),
    ],
)
def test_a_broken_file_is_refused_with_its_line(
    tmp_path: Path, name: str, content: str | bytes, said: str
) -> None:
    with pytest.raises(DataError) as caught:
        read_table(file(tmp_path, name, content))
    assert said in str(caught.value)


def test_the_csv_modules_own_limit_is_left_as_it_was(tmp_path: Path) -> None:
    import csv

    before = csv.field_size_limit()
    long = "x" * (before + 1)
    assert read_table(file(tmp_path, "a.csv", f"text\n{long}\n")).rows == [{"text": long}]
    assert csv.field_size_limit() == before


@pytest.mark.parametrize("more", [{}, {"lines": [2, 3, 5, 6, 9]}, {"numbers": [1, 3, 4, 7, 8]}])
def test_rows_are_taken_in_parts_with_their_places_and_are_gone(more: dict[str, list[int]]) -> None:
    rows = [{"text": str(index)} for index in range(5)]
    table = Table(list(rows), "mail.csv", **more)
    places = [table.where(index) for index in range(5)]
    found: list[tuple[dict[str, str], str]] = []
    for part in table.taken(2):
        assert len(part.rows) <= 2
        found += [(row, part.where(index)) for index, row in enumerate(part.rows)]
        assert not any(row in table.rows for row, _ in found)
    assert found == list(zip(rows, places, strict=True))
    assert table.where(4) == places[4]


def test_rows_of_json_lines_share_the_names_of_their_columns(tmp_path: Path) -> None:
    path = tmp_path / "mail.jsonl"
    path.write_text('{"a column of its own": 1}\n{"a column of its own": 2}\n')
    (first,), (second,) = (list(row) for row in read_table(path).rows)
    assert first is second
