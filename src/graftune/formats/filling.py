"""Empty grafts and a file's tensors brought together: the same names and shapes, or nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from graftune.errors import BaseMismatchError, FormatError
from graftune.formats.directory import Directory
from graftune.formats.tensors import listed
from graftune.methods.base import Method
from graftune.sites.base import Graft


def own_method(found: Directory) -> Method:
    """Returns the method that graftune.json names.

    Raises:
        SettingsError: there is no such method, or it has no such setting.
    """
    assert found.own is not None
    return Method.from_dict(found.own["method"])


def fill(
    grafts: Sequence[Graft], named: Mapping[str, Tensor], where: str, found: Directory
) -> None:
    """Copies a file's tensors, by absolute name, into empty grafts.

    Raises:
        FormatError: some are missing or not expected; the message lists them.
        BaseMismatchError: some have another shape.
    """
    own = {key: tensor for graft in grafts for key, tensor in graft.tensors()}
    check_names(own, named, where, found)
    for key, tensor in own.items():
        tensor.data.copy_(named[key])


def check_names(
    own: Mapping[str, Any], named: Mapping[str, Tensor], where: str, found: Directory
) -> None:
    """Raises unless a file's tensors are those that its settings ask for, of the same shapes."""
    missing = sorted(own.keys() - named.keys())
    strangers = sorted(named.keys() - own.keys())
    problems = [f"{len(missing)} missing: {listed(missing)}"] if missing else []
    if strangers:
        problems.append(f"{len(strangers)} unexpected: {listed(strangers)}")
    if problems:
        raise FormatError(f"{where}: its tensors don't fit its settings: {'; '.join(problems)}.")
    wrong = [
        f'"{key}" is {tuple(named[key].shape)}, this model needs {tuple(tensor.shape)}'
        for key, tensor in own.items()
        if named[key].shape != tensor.shape
    ]
    if wrong:
        raise BaseMismatchError(
            f"{where} was made for another {_base_of(found)}: {len(wrong)} tensors have another "
            f"shape: {wrong[0]}."
        )


def _base_of(found: Directory) -> str:
    if found.own is None:
        return f'base, "{found.config.get("base_model_name_or_path")}"'
    saved = found.own.get("base", {})
    return f'{saved.get("class")} "{saved.get("name")}"'
