"""Safetensors files: the same bytes for the same tensors, and every broken one is refused."""

from __future__ import annotations

import json
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from graftune.errors import FormatError
from graftune.formats.tensors import listed, nonfinite, read_header, read_tensors, write_tensors

TENSORS = {
    "b": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "a": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "c.d": torch.zeros(0, 4),
    "scalar": torch.tensor(7, dtype=torch.int64),
    "half": torch.ones(3, dtype=torch.float16),
    "t": torch.arange(6.0).reshape(2, 3).t(),
    "flag": torch.tensor([True, False]),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "x.safetensors"
    write_tensors(path, TENSORS)
    return path


def test_what_is_written_is_read_by_us_and_by_safetensors(file: Path) -> None:
    theirs = safetensors.torch.load_file(file)
    ours = read_tensors(file)
    assert theirs.keys() == ours.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(ours[name], tensor)
        assert torch.equal(theirs[name], tensor)
        assert ours[name].dtype == tensor.dtype


def test_metadata_says_pt(file: Path) -> None:
    assert read_header(file).metadata == {"format": "pt"}


def test_the_same_tensors_give_the_same_bytes_in_any_order(file: Path, tmp_path: Path) -> None:
    write_tensors(tmp_path / "y", dict(reversed(TENSORS.items())))
    assert (tmp_path / "y").read_bytes() == file.read_bytes()


def test_what_safetensors_writes_is_read(tmp_path: Path) -> None:
    safetensors.torch.save_file({"x": torch.ones(2)}, tmp_path / "s")
    assert read_header(tmp_path / "s").entries["x"].shape == (2,)


def test_reading_a_header_imports_no_torch(file: Path) -> None:
    code = (
        "import sys, pathlib; from graftune.formats.tensors import read_header;"
        f"print(len(read_header(pathlib.Path({str(file)!r})).entries), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(len(TENSORS)), "False"]


@pytest.mark.parametrize("kept", [0, 5, 8, 100, -1, -20])
def test_every_cut_is_told(file: Path, kept: int) -> None:
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(FormatError, match="isn't a whole safetensors file"):
        read_header(file)


def test_bytes_too_many_are_told(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"xy")
    with pytest.raises(FormatError, match="2 bytes follow its last tensor"):
        read_header(file)


def header_of(entry: object) -> bytes:
    text = json.dumps({"x": entry}).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (struct.pack("<Q", 4) + b"{{{{", "header isn't JSON"),
        (struct.pack("<Q", 2) + b"[]", "header isn't a JSON object"),
        (header_of({"dtype": "F32"}), 'describes "x" wrongly'),
        (header_of({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}) + b"0" * 4, "4 bytes"),
        (header_of({"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}) + b"0" * 4, "4 bytes"),
        (header_of({"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}) + b"0" * 8, "starts at"),
        (header_of({"dtype": "Q3", "shape": [1], "data_offsets": [0, 4]}) + b"0" * 4, "type 'Q3'"),
        (pickle.dumps({"x": 1}, protocol=2) + b" " * 50, "it is a pickle"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS pointer"),
        (b"<html>" + b" " * 50, "cut short or not one"),
    ],
)
def test_every_broken_file_is_told(tmp_path: Path, content: bytes, told: str) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(FormatError, match=told):
        read_header(tmp_path / "x")


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="is missing"):
        read_header(tmp_path / "x")


def test_values_that_are_not_finite_are_counted(tmp_path: Path) -> None:
    inf, nan = float("inf"), float("nan")
    bad = torch.tensor([1.0, inf, -inf, nan])
    types = {"f64": torch.float64, "f32": torch.float32, "f16": torch.float16, "bf": torch.bfloat16}
    write_tensors(tmp_path / "x", {k: bad.to(v) for k, v in types.items()} | {"ok": torch.ones(2)})
    assert nonfinite(read_header(tmp_path / "x")) == dict.fromkeys(sorted(types), 3)


def test_a_dtype_safetensors_lacks_is_told(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="complex64"):
        write_tensors(tmp_path / "x", {"x": torch.zeros(1, dtype=torch.complex64)})


def test_many_names_are_listed_short() -> None:
    assert listed(["a", "b"]) == '"a", "b"'
    assert listed(list("abcdefg")) == '"a", "b", "c", "d", "e" and 2 more'
