"""An AdapterHub directory onto a model: all of it or nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn

from graftune import adapter as adapters
from graftune.adapter import Planned
from graftune.attached import anatomy_of
from graftune.errors import BaseMismatchError, FormatError
from graftune.formats import directory
from graftune.formats.adapterhub import folder as folders
from graftune.formats.adapterhub import heads as head_files
from graftune.formats.adapterhub import names
from graftune.formats.adapterhub.base import Reading
from graftune.formats.adapterhub.folder import Folder
from graftune.formats.adapterhub.kinds import kind_of
from graftune.formats.directory import Directory
from graftune.formats.tensors import read_tensors

if TYPE_CHECKING:
    from pathlib import Path

    from graftune.adapter import Adapter


@dataclasses.dataclass(frozen=True, kw_only=True)
class Saved:
    """One adapter or fusion as it lies in a directory."""

    folder: Folder
    tensors: Mapping[str, Tensor]
    head: Mapping[str, Tensor]
    """The tensors of the head that lies with it."""

    @property
    def everything(self) -> dict[str, Tensor]:
        """All tensors by name."""
        return {**self.tensors, **self.head}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choices:
    """How a directory is to be loaded."""

    where: str
    """The directory, for messages."""
    check_base: bool = True
    """Compare the model's type with the one the directory is for."""
    head: bool = True
    """Load the head that lies in it."""


def read(folder: Path, where: str, *, allow_pickle: bool, head: bool) -> Saved:
    """Returns what lies in a directory.

    Raises:
        FormatError: a file is missing or broken, or a pickle that isn't allowed.
    """
    found = folders.read(folder)
    beside = found.head if head else None
    return Saved(
        folder=found,
        tensors=_tensors(found, where, allow_pickle),
        head={} if beside is None else _tensors(beside, where, allow_pickle),
    )


def load(model: nn.Module, saved: Saved, name: str, choices: Choices) -> Adapter:
    """Attaches an adapter.

    Raises:
        FormatError: settings or tensors can't be; the message names them.
        BaseMismatchError: it was made for another base.
    """
    where, folder = choices.where, saved.folder
    if choices.check_base:
        _check_base(model, folder, where)
    kind = kind_of(folder.settings, where, folder.wrote)
    config = kind.checked(folder.settings, where, folder.wrote)
    base = _base_of(folder)

    parts = anatomy_of(model)
    tensors = names.sort(saved.tensors, parts, folder.name, where, base)
    if kind.in_every_block:
        names.check_even(tensors, parts, kind.left_out(config, parts), where, base)
    head = head_files.Head()
    if choices.head and folder.head is not None:
        head = head_files.read(folder.head.config, saved.head, model, parts, where)
    reading = Reading(
        where=where, model=model, anatomy=parts, folder=folder, config=config, tensors=tensors
    )
    method, grafts = kind.planned(reading, head.modules)
    planned = Planned(method, grafts + head.grafts(model), head.modules)
    return adapters.attach_planned(model, method, name, lambda _: planned)


def _tensors(part: Directory, where: str, allow_pickle: bool) -> dict[str, Tensor]:
    if part.tensors is not None:
        return read_tensors(part.tensors.path)
    assert part.pickle is not None
    if not allow_pickle:
        raise FormatError(directory.pickle_refusal(where, part.pickle))
    return directory.unpickled(part.path / part.pickle)


def _check_base(model: nn.Module, folder: Folder, where: str) -> None:
    ours = getattr(getattr(model, "config", None), "model_type", None)
    theirs = folder.config.get("model_type")
    if theirs and ours and theirs != ours:
        raise BaseMismatchError(
            f"{where} was made for {_base_of(folder)}, of type {theirs}; this "
            f"{type(model).__name__} is of type {ours}."
        )


def _base_of(folder: Folder) -> str:
    parts = (folder.config.get("model_class"), folder.config.get("model_name"))
    named = [parts[0] or "a model", f'"{parts[1]}"' if parts[1] else ""]
    return " ".join(filter(None, named))
