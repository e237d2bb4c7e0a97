"""Safetensors files: written in one fixed order, their headers read and checked without torch.

    8 bytes n, little endian | n bytes of JSON {name: {dtype, shape, data_offsets}} | the tensors

Writing streams tensor by tensor, so a file of any size needs no second copy in memory, and the
same tensors give the same bytes. Nothing here ever unpickles.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftune.errors import FormatError

if TYPE_CHECKING:
    import torch

_MAX_HEADER_BYTES = 100_000_000
_ALIGNMENT = 8
_SHOWN = 5
# Name in the file -> (bytes per value, name in torch, exponent bits: all ones is inf or nan).
_DTYPES: dict[str, tuple[int, str, int]] = {
    "F64": (8, "float64", 0x7FF0_0000_0000_0000),
    "F32": (4, "float32", 0x7F80_0000),
    "BF16": (2, "bfloat16", 0x7F80),
    "F16": (2, "float16", 0x7C00),
    "F8_E5M2": (1, "float8_e5m2", 0x7C),
    "F8_E4M3": (1, "float8_e4m3fn", 0),
    "I64": (8, "int64", 0),
    "I32": (4, "int32", 0),
    "I16": (2, "int16", 0),
    "I8": (1, "int8", 0),
    "U8": (1, "uint8", 0),
    "BOOL": (1, "bool", 0),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """One tensor of a file, as its header describes it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    """First byte, counted from the beginning of the file."""
    end: int

    @property
    def count(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """Bytes."""
        return self.end - self.start


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorFile:
    """The checked header of a safetensors file."""

    path: Path
    entries: dict[str, TensorEntry]
    metadata: dict[str, str]
    size: int
    """Bytes of the whole file."""


def read_header(path: Path) -> TensorFile:
    """Reads and checks the header of a safetensors file; imports no torch.

    Raises:
        FormatError: the file is missing, truncated, isn't safetensors, or contradicts itself.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else None
            if length is None or length > min(size - 8, _MAX_HEADER_BYTES):
                raise _corrupt(path, _length_problem(head, length, size))
            raw = json.loads(file.read(length).decode("utf-8"))
    except FileNotFoundError:
        raise FormatError(f'"{path}" is missing.') from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise _corrupt(path, f"its header isn't JSON ({error})") from None
    except OSError as error:
        raise FormatError(f'can\'t read "{path}": {error.strerror}.') from error
    if not isinstance(raw, dict):
        raise _corrupt(path, "its header isn't a JSON object")
    metadata = raw.pop("__metadata__", None) or {}
    data = 8 + length
    entries = {name: _entry(path, name, value, data) for name, value in raw.items()}
    _check_layout(path, entries, data, size)
    return TensorFile(path=path, entries=entries, metadata=dict(metadata), size=size)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Returns a file's tensors by name, memory mapped: bytes are read when a tensor is.

    Raises:
        FormatError: as `read_header`.
    """
    import safetensors

    header = read_header(path)
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in sorted(header.entries)}
    except safetensors.SafetensorError as error:
        raise _corrupt(path, str(error)) from error


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes a safetensors file whose bytes depend on the names and values alone.

    Wide types come first, so that every tensor lies aligned; within a type, names are sorted.
    Tensors that share memory are written once for each name.

    Raises:
        OSError: the disk is full or the path can't be written.
    """
    import torch

    names = {getattr(torch, torch_name): name for name, (_, torch_name, _) in _DTYPES.items()}
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in names:
            raise FormatError(f'"{name}" is of type {tensor.dtype}, which safetensors can\'t hold.')
        end = start + tensor.numel() * tensor.element_size()
        entry = {"dtype": names[tensor.dtype], "shape": list(tensor.shape)}
        header[name] = entry | {"data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for name in order:
            file.write(_bytes(tensors[name]))


def nonfinite(file: TensorFile) -> dict[str, int]:
    """Returns how many values of each tensor are infinite or not a number; imports no torch."""
    import numpy

    found: dict[str, int] = {}
    for name, entry in sorted(file.entries.items()):
        width, _, exponent = _DTYPES[entry.dtype]
        if exponent and entry.count:
            kind = numpy.dtype(f"<u{width}")
            values = numpy.memmap(file.path, kind, "r", entry.start, (entry.count,))
            mask = kind.type(exponent)
            bad = int(numpy.count_nonzero((values & mask) == mask))
            if bad:
                found[name] = bad
    return found


def listed(names: list[str]) -> str:
    """Returns the first few of many names and their number: '"a", "b" and 7 more'."""
    shown = ", ".join(f'"{name}"' for name in names[:_SHOWN])
    return shown + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _bytes(tensor: torch.Tensor) -> memoryview:
    import torch

    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy().data) if flat.numel() else memoryview(b"")


def _entry(path: Path, name: str, value: Any, data: int) -> TensorEntry:
    try:
        dtype, shape = value["dtype"], tuple(int(size) for size in value["shape"])
        start, end = (int(offset) for offset in value["data_offsets"])
    except (KeyError, TypeError, ValueError):
        raise _corrupt(path, f'its header describes "{name}" wrongly: {value!r:.100}') from None
    if dtype not in _DTYPES:
        raise FormatError(
            f'"{path}": tensor "{name}" is of type {dtype!r}; known are {", ".join(_DTYPES)}.'
        )
    if min(shape, default=0) < 0 or end - start != math.prod(shape) * _DTYPES[dtype][0]:
        raise _corrupt(path, f'"{name}" of shape {list(shape)} has {end - start} bytes')
    return TensorEntry(name=name, dtype=dtype, shape=shape, start=data + start, end=data + end)


def _check_layout(path: Path, entries: dict[str, TensorEntry], data: int, size: int) -> None:
    at = data
    for entry in sorted(entries.values(), key=lambda entry: (entry.start, entry.end)):
        if entry.start != at:
            raise _corrupt(path, f'"{entry.name}" starts at byte {entry.start}, not at {at}')
        at = entry.end
    if at > size:
        raise _corrupt(path, f"its header promises {at:,} bytes and it has {size:,}: cut short")
    if at < size:
        raise _corrupt(path, f"{size - at:,} bytes follow its last tensor")


def _length_problem(head: bytes, length: int | None, size: int) -> str:
    if head.startswith(b"version ") or head.startswith(b"version"):
        return "it is a Git LFS pointer, not the file itself (git lfs pull fetches it)"
    if head[:2] in (b"PK", b"\x80\x02"):
        return "it is a pickle, not safetensors"
    if length is None:
        return f"it has {size} bytes, not even a header"
    return f"its header would be {length:,} bytes and the file has {size:,}: cut short or not one"


def _corrupt(path: Path, problem: str) -> FormatError:
    return FormatError(f'"{os.fspath(path)}" isn\'t a whole safetensors file: {problem}.')
