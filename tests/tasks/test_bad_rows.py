"""Rows and files that can't be used: refused with their line, or left out and counted."""

import json
from pathlib import Path
from typing import Any

import pytest

from graftune.errors import DataError
from graftune.tasks.bad_rows import KEPT_REASONS, BadRows
from graftune.tasks.classification import Classification
from graftune.tasks.data import DataReport, Loaded, load
from graftune.tasks.labelling import Labelling
from graftune.tasks.settings import DataSettings
from graftune.tasks.task import Task

GOOD = "text,label\nhello there,a\nbye now,b\nstill here,a\n"


def read(path: Path, content: str | bytes, task: Task | None = None, **settings: Any) -> Loaded:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    chosen = DataSettings(train=str(path), test_fraction=0, validation_fraction=0, **settings)
    return load(chosen, task or Classification())


def skipped(path: Path, content: str | bytes, task: Task | None = None) -> tuple[int, DataReport]:
    found = read(path, content, task, skip_bad=True)
    return len(found.splits["train"]), found.report


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", GOOD.encode("utf-16"), "a.csv:1: the text is in UTF-16; save it as UTF-8"),
        ("a.csv", GOOD.encode("utf-16-le"), "a.csv:1: the text is in UTF-16LE"),
        ("a.csv", GOOD.encode("utf-16-be"), "a.csv:1: the text is in UTF-16BE"),
        ("a.csv", GOOD.encode("utf-32"), "a.csv:1: the text is in UTF-32"),
        ("a.csv", b"text,label\ncaf\xe9,b\n", "iconv -f latin1 -t utf-8"),
        ("a.csv", b"text,label\nit\x92s,b\n", "a.csv:2: byte 0x92 is not UTF-8"),
        ("a.csv", b"text,label\nit\x92s,b\n", "iconv -f windows-1252 -t utf-8"),
        ("a.csv", 'text,label\n"abc,b\nx,y\nz,w\n', "a.csv:2: not valid CSV: a quotation mark"),
        ("a.csv", 'text,label\n"hi" there,b\n', "a.csv:2: not valid CSV: ',' expected"),
        ("a.csv", 'text,label\n"abc,b\nx,y\n"q"w,z\n', "a quotation mark on line 2 is closed"),
        ("a.csv", "text,label\nabc\nx,y\n", "a.csv:2: this row has 1 fields"),
        ("a.csv", "text,label\nabc,\nx,y\n", 'a.csv:2: the label ("label") is missing'),
        ("a.csv", "text,label\n,z\nx,y\n", 'a.csv:2: the text ("text") is empty'),
        ("a.csv", "text,label\nab\0c,a\n", "a.csv:2: the row holds a NUL byte"),
        ("a.csv", '{"text": "a", "label": "x"}\n', "one a line. Rename it a.jsonl."),
        ("a.csv", b"PAR1" + b"\0" * 40, "is a Parquet file, whatever its ending says. Rename it"),
        ("a.csv", b"PK\x03\x04" + b"\xff" * 9, "is a ZIP archive or an Excel sheet"),
        ("a.csv", b"\x1f\x8b\x08\0", "is packed with gzip"),
        ("a.csv", "<!DOCTYPE html><html></html>", "is a web page"),
        ("a.csv", "\n\n", "the file is empty"),
        ("a.tsv", GOOD, "a.tsv:1: the first line holds no tab, but commas"),
        ("a.jsonl", "version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        ("a.jsonl", GOOD, "looks like CSV. Rename it a.csv."),
        ("a.jsonl", '{\n "text": "a",\n "label": "x"\n}\n', "over several lines"),
        ("a.jsonl", '[{"text": "a", "label": "x"},\n{"text": "b"}]', "Rename it a.json."),
        ("a.jsonl", '{"text": "a", "label": "x"}\n{"text":\n', "a.jsonl:2: not valid JSON"),
        ("a.jsonl", '{"text": "a", "text": "b", "label": "x"}\n', 'the key "text" twice'),
        ("a.jsonl", '{"text": "a\\ud800b", "label": "x"}\n', "a.jsonl:1: a text holds \\ud800"),
        ("a.jsonl", '{"text": "a", "label": null}\n', "a.jsonl:1: the label"),
        ("a.jsonl", '{"text": "a", "label": NaN}\n', "a.jsonl:1: the label"),
        ("a.jsonl", '{"text": "a", "label": ["x", "y"]}\n', "expected one name"),
        ("a.json", '{"text": "a", "label": "x"}\n{"text": "b"}\n', "Rename it a.jsonl."),
        ("a.json", '{"text": ["a"], "label": ["x"]}', 'an object with "text", "label"'),
        ("a.json", "[" * 100_000, "nested too deeply"),
    ],
)
def test_what_cant_be_used_is_said_with_its_place(
    tmp_path: Path, name: str, content: str | bytes, said: str
) -> None:
    with pytest.raises(DataError) as caught:
        read(tmp_path / name, content)
    assert said in str(caught.value)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.conll"])
def test_all_line_ends_give_the_same_rows(tmp_path: Path, name: str, end: str) -> None:
    lines = [json.dumps({"text": t, "label": t[0]}) for t in ("ab", "ba", "ca")]
    texts = {
        "a.csv": GOOD,
        "a.jsonl": "\n".join(lines),
        "a.conll": "A O\nB B-x\n\nC O\n\nD O\n",
    }
    task = Labelling() if name == "a.conll" else None
    found = read(tmp_path / name, texts[name].replace("\n", end), task)
    assert found.report.rows == {"train": 3}


def test_a_row_of_one_cell_of_many_megabytes_is_read(tmp_path: Path) -> None:
    long = "x " * 2_000_000
    found = read(tmp_path / "a.csv", f"text,label\n{long},a\nb,c\n")
    assert len(found.splits["train"][0].fields["text"]) == len(long)


def test_a_parquet_file_cut_short_and_one_with_equal_columns_are_refused(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet is read with pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet", reason="Parquet is read with pyarrow")
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["a"] * 9, "label": ["b"] * 9}), path)
    with pytest.raises(DataError, match="not a whole one"):
        read(path, path.read_bytes()[:-20])
    twice = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["text", "text"])
    parquet.write_table(twice, path)
    with pytest.raises(DataError, match="two columns of one name"):
        read(path, path.read_bytes())


def test_a_quote_that_is_never_closed_costs_its_own_line_only(tmp_path: Path) -> None:
    rows, report = skipped(tmp_path / "a.csv", 'text,label\nu,a\n"abc,b\nx,y\nz,a\n')
    assert rows == 3
    assert "1 × " in report.notes[1]
    assert "a.csv:3: not valid CSV" in report.notes[1]


def test_bad_rows_of_every_kind_are_left_out_counted_and_explained(tmp_path: Path) -> None:
    text = 'text,label\na,x\n"b" c,x\nd\n,y\ne,\nf,y\nab\0c,a\ng,y,z\nh,i,j\nk,x\n'
    rows, report = skipped(tmp_path / "a.csv", text)
    assert rows == 3
    assert sum(report.left_out["train"].values()) == 7
    assert report.notes[0] == "7 train rows were left out (data.skip_bad)."
    three = next(reason for reason in report.left_out["train"] if "has 3 fields" in reason)
    assert report.left_out["train"][three] == 2


@pytest.mark.parametrize(
    ("name", "content", "kept", "place"),
    [
        ("a.jsonl", '{"text": "a", "label": "x"}\n{"te\n{"text": "b", "label": "y"}', 2, ":2"),
        ("a.json", '[{"text": "a", "label": "x"}, 5, {"text": "b"}]', 1, " row 2"),
        ("a.json", '[5, {"text": "a", "label": "x"}, {"text": "b"}]', 1, " row 3"),
        ("a.conll", "A B-x\n\nB O\nC\nD O\n\nE O\n", 2, ":4"),
    ],
)
def test_rows_left_out_keep_their_places(
    tmp_path: Path, name: str, content: str, kept: int, place: str
) -> None:
    rows, report = skipped(
        tmp_path / name, content, Labelling() if name == "a.conll" else Classification()
    )
    assert rows == kept
    assert any(f"{name}{place}: " in note for note in report.notes), report.notes


def test_a_given_splits_bad_rows_are_counted_as_that_splits(tmp_path: Path) -> None:
    (tmp_path / "held.csv").write_text("text,label\nq,a\nr\n")
    found = read(tmp_path / "a.csv", GOOD, test=str(tmp_path / "held.csv"), skip_bad=True)
    assert [sum(found.report.left_out[s].values()) for s in ("train", "test")] == [0, 1]


def test_a_file_of_bad_rows_alone_is_an_error_that_says_why(tmp_path: Path) -> None:
    for text in ("text,label\na\nb\n", "text,label\na,\nb,\n"):
        with pytest.raises(DataError, match=r"can be used: 2 are bad|2 are bad, the first"):
            skipped(tmp_path / "a.csv", text)


def test_kept_reasons_are_bounded() -> None:
    bad = BadRows()
    for number in range(10 * KEPT_REASONS):
        bad.add(f"a:{number}", f"reason {number}")
    assert len(bad.reasons) == KEPT_REASONS + 1
    assert sum(bad.reasons.values()) == bad.count == 10 * KEPT_REASONS


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (["1", 1, 1.0, "one"], "several types: 1 decimal number, 2 text, 1 whole number"),
        (["1", 1, 1.0, "one"], 'numbers and words: "1" and "one"'),
        (["1.0", "1"], '"1.0", "1" differ in writing only'),
        (["Spam", "spam "], '"Spam", "spam" differ in writing only'),
        (["nan", "x"], '"nan" (1 rows) is taken for a train label'),
    ],
)
def test_odd_labels_are_said(tmp_path: Path, labels: list[Any], said: str) -> None:
    rows = [{"text": f"t {n}", "label": label} for n, label in enumerate(labels)]
    found = read(tmp_path / "a.jsonl", "\n".join(json.dumps(row) for row in rows))
    assert said in " ".join(found.report.notes)


def test_plain_labels_are_not_remarked_on(tmp_path: Path) -> None:
    assert read(tmp_path / "a.csv", GOOD).report.notes == []
    assert read(tmp_path / "b.csv", "text,label\na,0\nb,1\nc,10\n").report.notes == []
