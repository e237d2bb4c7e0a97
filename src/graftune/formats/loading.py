"""Reading an adapter's directory, ours or HF PEFT's, onto a model: all of it or nothing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graftune import adapter as adapters
from graftune.adapter import Adapter
from graftune.anatomy import Anatomy
from graftune.errors import BaseMismatchError, FormatError, SettingsError
from graftune.formats import base, directory, peft_reading, peft_settings
from graftune.formats.atomic import read_whole
from graftune.formats.directory import Directory
from graftune.formats.factors import Slice
from graftune.formats.hub import located
from graftune.formats.tensors import listed, read_tensors
from graftune.methods.base import Method
from graftune.methods.lora import LoRA
from graftune.sites.base import Graft, base_modules, is_base
from graftune.sites.parameter import own_value


def load(
    model: nn.Module,
    path: str | Path,
    name: str | None = None,
    *,
    allow_pickle: bool = False,
    check_base: bool = True,
) -> Adapter:
    """Attaches an adapter from a directory, activates it, and returns it.

    Args:
        model: the base it was made for.
        path: a folder written by graftune or HF PEFT, or "owner/name" on the model hub.
        name: what to call it; None takes the folder's name.
        allow_pickle: also read adapter_model.bin, by torch's loader that runs no code.
        check_base: compare the base with the one that graftune wrote down.

    Raises:
        FormatError: a file is missing, broken or not supported; tensors are missing, unexpected or
            not finite; the message lists them. Nothing is attached then.
        BaseMismatchError: the adapter was made for another base; the message names both.
        AdapterError: the name is taken or can't be one.
    """
    model = adapters.plain_model(model)
    where = f'"{path}"'
    found, tensors = read_whole(located(path), lambda folder: _read(folder, where, allow_pickle))
    _check_finite(tensors, where)
    own = found.own
    if own is not None and check_base and not _is_merged(model):
        base.check(model, own["base"], where, skip=own.get("heads", ()))
    try:
        if found.config["peft_type"] == "LORA":
            return _load_lora(model, found, tensors, where, name or default_name(path))
        return _load_own(model, found, tensors, where, name or default_name(path))
    except SettingsError as error:
        raise FormatError(f"{where}, {_version(found)}: {error}") from error


def default_name(path: str | Path) -> str:
    """Returns the adapter name that a path suggests: its last part, dots replaced."""
    return Path(path).resolve().name.replace(".", "-").strip() or "default"


def _read(folder: Path, where: str, allow_pickle: bool) -> tuple[Directory, dict[str, Tensor]]:
    found = directory.read(folder)
    if found.tensors is not None:
        return found, read_tensors(found.tensors.path)
    if not allow_pickle:
        raise FormatError(
            f"{where} keeps its weights as a pickle, {found.pickle}, which can hold code: pass "
            "allow_pickle=True to read it by torch's loader that runs none."
        )
    return found, directory.unpickled(folder)


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


def _load_lora(
    model: nn.Module, found: Directory, tensors: Mapping[str, Tensor], where: str, name: str
) -> Adapter:
    config = peft_settings.checked(found.config, where)
    modules = base_modules(model)
    added = peft_settings.TASK_HEADS.get(str(config["task_type"]), ())
    config["modules_to_save"] = [*peft_settings.names(config["modules_to_save"]), *added]
    saved = tuple(peft_settings.saved_modules(config, modules))
    method: Method
    if found.own is None:
        places = [
            m if p == "weight" else f"{m}.{p}" for m, p in peft_reading.adapted(modules, config)
        ]
        method, heads = peft_reading.method_of(config, saved, places), saved
    else:
        method, heads = _method(found, where), tuple(found.own.get("heads", ()))
    assert isinstance(method, LoRA)
    reading = peft_reading.Reading(
        where=where,
        model=model,
        modules=modules,
        config=config,
        tensors=peft_reading.without_prefix(tensors),
        method=method,
        slices=_slices(found.own or {}),
        own=found.own is not None,
        heads=saved,
        values=None if found.own is None else found.own.get("values", {}),
    )

    def plan(parts: Anatomy) -> tuple[list[Graft], tuple[str, ...]]:
        grafts = peft_reading.grafts(reading, parts)
        peft_reading.fill(grafts, reading)
        return grafts, heads

    return adapters.attach_planned(model, method, name, plan)


def _load_own(
    model: nn.Module, found: Directory, tensors: Mapping[str, Tensor], where: str, name: str
) -> Adapter:
    if found.own is None:
        raise FormatError(
            f"{where} is of type {found.config['peft_type']}, written by HF PEFT; of its types "
            "this version reads LORA."
        )
    method, heads = _method(found, where), tuple(found.own.get("heads", ()))
    named = peft_reading.without_prefix(tensors)

    def plan(parts: Anatomy) -> tuple[list[Graft], tuple[str, ...]]:
        if method.trains_in_place:
            _check_names(dict(base_parameters(model)), named, where, found)
            return [], heads
        grafts = method.plan(model, parts, empty=True)
        have = {graft.place.key for graft in grafts}
        for head in heads:
            for key, _ in model.get_submodule(head).named_parameters():
                if is_base(key) and f"{head}.{key}" not in have:
                    grafts.append(own_value(model, f"{head}.{key}", empty=True, adds=False))
        own = {key: tensor for graft in grafts for key, tensor in graft.tensors()}
        _check_names(own, named, where, found)
        for key, tensor in own.items():
            tensor.data.copy_(named[key])
        return grafts, heads

    attached = adapters.attach_planned(model, method, name, plan)
    if method.trains_in_place:
        attached.load_state_dict(dict(named))
    return attached


def base_parameters(model: nn.Module) -> Any:
    """Returns the base's own tensors by name."""
    from graftune.sites.parameter import base_parameters as of_base

    return of_base(model)


def _check_names(
    own: Mapping[str, Tensor], named: Mapping[str, Tensor], where: str, found: Directory
) -> None:
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
        saved = (found.own or {}).get("base", {})
        raise BaseMismatchError(
            f'{where} was made for another {saved.get("class")} "{saved.get("name")}": '
            f"{len(wrong)} tensors have another shape: {wrong[0]}."
        )


def _method(found: Directory, where: str) -> Method:
    assert found.own is not None
    return Method.from_dict(found.own["method"])


def _slices(own: Mapping[str, Any]) -> dict[str, list[Slice]]:
    found: dict[str, list[Slice]] = {}
    for group in own.get("slices", []):
        parts = [
            Slice(role=p["role"], rank=p["rank"], rows=tuple((a, b) for a, b in p["rows"]))
            for p in group["parts"]
        ]
        found |= dict.fromkeys(group["modules"], parts)
    return found


def _version(found: Directory) -> str:
    if found.own is not None:
        return f"written by graftune {found.own.get('graftune_version')}"
    return f"written by PEFT {found.config.get('peft_version') or 'of unknown version'}"
