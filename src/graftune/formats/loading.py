"""Reading an adapter's directory onto a model, all of it or nothing: ours, PEFT's, AdapterHub's."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from graftune import adapter as adapters
from graftune.adapter import Adapter, Planned
from graftune.anatomy import Anatomy
from graftune.attached import anatomy_of
from graftune.errors import FormatError, SettingsError
from graftune.formats import base, directory, peft_types
from graftune.formats.adapterhub import loading as adapterhub
from graftune.formats.adapterhub import setups
from graftune.formats.adapterhub.folder import is_here as is_adapterhub
from graftune.formats.atomic import read_whole
from graftune.formats.directory import Directory
from graftune.formats.filling import check_names, fill, own_method
from graftune.formats.headless import without_heads
from graftune.formats.hub import located
from graftune.formats.peft_common import without_prefix
from graftune.formats.tensors import listed, read_tensors
from graftune.sites.parameter import base_parameters


def load(
    model: nn.Module,
    path: str | Path,
    name: str | None = None,
    *,
    allow_pickle: bool = False,
    check_base: bool = True,
    head: bool = True,
) -> Adapter:
    """Attaches an adapter from a directory, activates it, and returns it.

    Args:
        model: the base it was made for.
        path: a folder written by graftune, HF PEFT or AdapterHub, or "owner/name" on the model hub.
        name: what to call it; None takes the folder's name.
        allow_pickle: also read weights kept as a pickle, by torch's loader that runs no code.
        check_base: compare the base with what was written down of it.
        head: also load the head that lies with it; without, it acts below whatever head there is.

    Raises:
        FormatError: a file is missing, broken or not supported; tensors are missing, unexpected or
            not finite; the message lists them. Nothing is attached then.
        BaseMismatchError: the adapter was made for another base; the message names both.
        AdapterError: the name is taken or can't be one.
    """
    model = adapters.plain_model(model)
    where = f'"{path}"'
    saved = read_whole(located(path), lambda folder: _read(folder, where, allow_pickle, head))
    if isinstance(saved, adapterhub.Saved | setups.Setup):
        choices = adapterhub.Choices(where=where, check_base=check_base, head=head)
        return _load_adapterhub(model, saved, name, choices)
    found, tensors = saved
    name = name or default_name(path)
    _check_finite(tensors, where)
    own = found.own
    if own is not None and check_base and not _is_merged(model):
        base.check(model, own["base"], where, skip=own.get("heads", ()))
    with _refused(where, _version(found)):
        if not head:
            found, tensors = without_heads(model, anatomy_of(model), found, tensors)
        if own is not None and (own_method(found).trains_in_place or not own.get("peft", True)):
            return _load_own(model, found, tensors, where, name)
        kind = peft_types.reader(found.config["peft_type"], where)
        return kind.load(model, found, tensors, where, name)


def _load_adapterhub(
    model: nn.Module,
    saved: adapterhub.Saved | setups.Setup,
    name: str | None,
    choices: adapterhub.Choices,
) -> Adapter:
    parts = (saved,) if isinstance(saved, adapterhub.Saved) else saved.parts
    for part in parts:
        _check_finite(part.everything, choices.where)
    with _refused(choices.where, parts[0].folder.wrote):
        if isinstance(saved, adapterhub.Saved):
            return adapterhub.load(model, saved, name or default_name(saved.folder.path), choices)
        if name is not None:
            raise SettingsError(
                f'it is a setup, whose adapters have names already: leave name out, found "{name}".'
            )
        return setups.load(model, saved, choices)


@contextlib.contextmanager
def _refused(where: str, wrote: str) -> Iterator[None]:
    """Says of settings that can't be in whose file they stand."""
    try:
        yield
    except SettingsError as error:
        raise FormatError(f"{where}, written by {wrote}: {error}") from error


def default_name(path: str | Path) -> str:
    """Returns the adapter name that a path suggests: its last part, dots replaced."""
    return Path(path).resolve().name.replace(".", "-").strip() or "default"


def _read(
    folder: Path, where: str, allow_pickle: bool, head: bool
) -> tuple[Directory, dict[str, Tensor]] | adapterhub.Saved | setups.Setup:
    if is_adapterhub(folder):
        setup = setups.read(folder, where, allow_pickle=allow_pickle, head=head)
        return setup or adapterhub.read(folder, where, allow_pickle=allow_pickle, head=head)
    found = directory.read(folder)
    if found.tensors is not None:
        return found, read_tensors(found.tensors.path)
    assert found.pickle is not None
    if not allow_pickle:
        raise FormatError(directory.pickle_refusal(where, found.pickle))
    return found, directory.unpickled(folder / found.pickle)


def _check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    bad = [
        name
        for name, tensor in tensors.items()
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())
    ]
    if bad:
        raise FormatError(
            f"{where}: {len(bad)} of {len(tensors)} tensors hold values that aren't finite: "
            f"{listed(bad)}."
        )


def _is_merged(model: nn.Module) -> bool:
    state = model.__dict__.get(adapters.STATE)
    return state is not None and state.merged is not None


def _load_own(
    model: nn.Module, found: Directory, tensors: Mapping[str, Tensor], where: str, name: str
) -> Adapter:
    """Attaches an adapter whose file has our own names."""
    assert found.own is not None
    method, heads = own_method(found), tuple(found.own.get("heads", ()))
    named = without_prefix(tensors)

    def plan(parts: Anatomy) -> Planned:
        if method.trains_in_place:
            check_names(base_parameters(model), named, where, found)
            return Planned(method, [], heads)
        grafts = method.plan_saved(model, parts, named)
        grafts += adapters.head_grafts(model, heads, grafts, empty=True)
        fill(grafts, named, where, found)
        return Planned(method, grafts, heads)

    attached = adapters.attach_planned(model, method, name, plan)
    if method.trains_in_place:
        attached.load_state_dict(dict(named))
    return attached


def _version(found: Directory) -> str:
    if found.own is not None:
        return f"graftune {found.own.get('graftune_version')}"
    return f"PEFT {found.config.get('peft_version') or 'of unknown version'}"
