"""The files of an adapter directory, read and checked but not yet understood."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftune.errors import FormatError
from graftune.formats.tensors import TensorFile, read_header

if TYPE_CHECKING:
    import torch

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
OWN = "graftune.json"
CARD = "README.md"

FORMAT_VERSION = 1
"""Of graftune.json; raised when older versions of graftune could no longer read it rightly."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Directory:
    """What lies in an adapter directory."""

    path: Path
    config: dict[str, Any]
    own: dict[str, Any] | None
    """graftune.json; None where another program wrote the directory."""
    tensors: TensorFile | None
    """The checked header; None where the weights are a pickle."""
    pickle: str | None
    size: int
    """Bytes of the files named here."""


def read(folder: Path) -> Directory:
    """Reads the JSON files and the tensor file's header.

    Raises:
        FormatError: a file is missing, isn't JSON, isn't whole, or is of another kind of adapter.
    """
    config = read_json(folder, CONFIG)
    if config is None:
        raise FormatError(f'"{folder}" has no {CONFIG}: {_what_instead(folder)}')
    if "peft_type" not in config:
        raise FormatError(f'"{folder / CONFIG}" has no "peft_type": {_foreign(config)}')
    own = read_json(folder, OWN)
    _check_own(folder, own)
    weights, pickle = folder / WEIGHTS, folder / PICKLE
    if not weights.exists() and not pickle.exists():
        raise FormatError(f'"{folder}" has no {WEIGHTS}: {_what_instead(folder)}')
    present = [folder / name for name in (CONFIG, WEIGHTS, OWN, CARD) if (folder / name).exists()]
    return Directory(
        path=folder,
        config=config,
        own=own,
        tensors=read_header(weights) if weights.exists() else None,
        pickle=None if weights.exists() else PICKLE,
        size=sum(file.stat().st_size for file in present),
    )


def pickle_refusal(where: str, pickle: str) -> str:
    """Returns why a pickle isn't opened unasked."""
    return (
        f"{where} keeps its weights as a pickle, {pickle}, which can hold code: pass "
        "allow_pickle=True to read it by torch's loader that runs none."
    )


def unpickled(file: Path) -> dict[str, torch.Tensor]:
    """Returns the tensors of a pickle, read by torch's loader that runs no code.

    Raises:
        FormatError: the file is broken or holds anything but tensors by name.
    """
    import pickle

    import torch

    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        first = str(error).partition("\n")[0]
        raise FormatError(f'"{file}" can\'t be read as tensors alone: {first}') from error
    if not isinstance(found, dict) or not all(isinstance(v, torch.Tensor) for v in found.values()):
        raise FormatError(f'"{file}" holds a {type(found).__name__}, not tensors by name.')
    return found


def read_json(folder: Path, name: str) -> dict[str, Any] | None:
    """Returns a JSON object's content, None where there is no such file.

    Raises:
        FormatError: it can't be read, or isn't one.
    """
    file = folder / name
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise FormatError(f'"{file}" isn\'t JSON: {error}.') from None
    except OSError as error:
        raise FormatError(f'can\'t read "{file}": {error.strerror}.') from error
    if not isinstance(found, dict):
        raise FormatError(f'"{file}" holds a {type(found).__name__}, not an object of settings.')
    return found


def _check_own(folder: Path, own: dict[str, Any] | None) -> None:
    if own is None:
        return
    version = own.get("format_version")
    if not isinstance(version, int) or isinstance(version, bool):
        raise FormatError(f'"{folder / OWN}" has no "format_version": it isn\'t from graftune.')
    if version > FORMAT_VERSION:
        raise FormatError(
            f'"{folder / OWN}" has format {version}, written by graftune '
            f"{own.get('graftune_version')}; this version reads up to {FORMAT_VERSION}: update "
            "graftune."
        )
    for key in ("method", "base"):
        if not isinstance(own.get(key), dict):
            raise FormatError(f'"{folder / OWN}" has no "{key}".')


def _foreign(config: dict[str, Any]) -> str:
    if "model_type" in config or "architectures" in config:
        return "it is the config of a whole model, not of an adapter."
    known = ", ".join(f'"{key}"' for key in sorted(config)[:5])
    return f"it isn't an adapter's config (it has {known or 'no settings'})."


def _what_instead(folder: Path) -> str:
    found = sorted(entry.name for entry in folder.iterdir())
    below = [name for name in found if (folder / name / CONFIG).exists()]
    if below:
        return f'adapters lie in its folders: try "{folder / below[0]}".'
    if "config.json" in found:
        return "it holds a whole model, not an adapter."
    return f"it holds {', '.join(found[:5])}." if found else "it is empty."
