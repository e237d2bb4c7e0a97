"""A directory without the head in it, for a model whose head is of another task."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from graftune.anatomy import Anatomy
from graftune.anatomy.modules import is_in
from graftune.errors import SettingsError
from graftune.formats.directory import Directory
from graftune.formats.filling import own_method
from graftune.formats.peft_common import PREFIX, PROMPT_PREFIX
from graftune.formats.peft_settings import TASK_HEADS, names, saved_modules
from graftune.methods.full import FullFineTuning
from graftune.sites.base import base_modules

Tensors = Mapping[str, Tensor]


def without_heads(
    model: nn.Module, anatomy: Anatomy, found: Directory, tensors: Tensors
) -> tuple[Directory, dict[str, Tensor]]:
    """Returns a directory, and its tensors, as if the adapter had been trained without a head.

    Raises:
        SettingsError: the head can't be left out, since the file is a whole model's.
    """
    if found.own is not None:
        return _ours(model, found, found.own, tensors)
    config, modules = found.config, base_modules(model)
    saved = [
        *names(config.get("modules_to_save")),
        *TASK_HEADS.get(str(config.get("task_type")), ()),
    ]
    matched = {word: saved_modules({"modules_to_save": [word]}, modules) for word in saved}
    kept = [w for w, m in matched.items() if m and not all(is_in(p, anatomy.heads) for p in m)]
    gone = tuple(word for word in saved if word not in kept)
    rest = {
        name: tensor
        for name, tensor in tensors.items()
        if not any(path.endswith(gone) for path in _above(name))
    }
    return _with(found, kept), rest


def _ours(
    model: nn.Module, found: Directory, own: Mapping[str, Any], tensors: Tensors
) -> tuple[Directory, dict[str, Tensor]]:
    if isinstance(own_method(found), FullFineTuning):
        raise SettingsError("it is a whole model: head=False can't leave its head out.")
    heads: Sequence[str] = own.get("heads", ())
    saved = saved_modules(
        {"modules_to_save": found.config.get("modules_to_save")}, base_modules(model)
    )
    bare = {
        **own,
        "heads": [],
        "method": {**own["method"], "train_head": False},
        "values": {k: v for k, v in own.get("values", {}).items() if not is_in(k, heads)},
    }
    rest = {n: t for n, t in tensors.items() if not any(is_in(m, heads) for m in _names(n))}
    kept = [path for path in saved if not is_in(path, heads)]
    return dataclasses.replace(_with(found, kept), own=bare), rest


def _with(found: Directory, kept: Sequence[str]) -> Directory:
    """Returns a directory whose settings save these modules whole."""
    config = {**found.config, "modules_to_save": list(kept) or None, "task_type": None}
    return dataclasses.replace(found, config=config)


def _names(key: str) -> tuple[str, str]:
    """Returns what a tensor may be called in the model; PEFT's prefix is shorter for prompts."""
    return key.removeprefix(PREFIX), key.removeprefix(PROMPT_PREFIX)


def _above(name: str) -> list[str]:
    """Returns the paths of the modules that a tensor lies in."""
    parts = name.removeprefix(PREFIX).split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts))]
