"""Adapters in AdapterHub's form, for the models whose names are known here.

    content   what becomes of an adapter: settings, tensors by AdapterHub's names
    save      the directory

What AdapterHub can't compute is refused with the reason; nothing is written then.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from graftune.anatomy.modules import is_in
from graftune.errors import FormatError
from graftune.formats.adapterhub import (
    bottleneck_writing,
    low_rank_writing,
    paths,
    prefix_writing,
    prompt_writing,
    reft_writing,
)
from graftune.formats.adapterhub.folder import HEAD, WEIGHTS
from graftune.formats.atomic import replacing
from graftune.formats.base import base_name
from graftune.formats.directory import CONFIG
from graftune.formats.tensors import listed, write_tensors
from graftune.methods._hybrid import Hybrid
from graftune.sites.parameter import OwnValue

if TYPE_CHECKING:
    from graftune.adapter import Adapter

VERSION = "adapters.1.3.0"
"""The `adapters` whose form is written."""
Content = tuple[dict[str, Any], dict[str, Tensor]]


def save(adapter: Adapter, path: str | Path) -> Path:
    """Writes an adapter's directory as AdapterHub does, and returns its path.

    Args:
        adapter: of bottlenecks, LoRA, (IA)^3, prefixes, prompts, ReFTs, or several of them.
        path: a new or empty folder.

    Raises:
        FormatError: AdapterHub can't compute it; or the path is in use or can't be written.
    """
    target = Path(path)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FormatError(f'"{path}" exists and is not empty; name a new folder.')
    settings, tensors = content(adapter)
    head = _head(adapter)
    with replacing(target) as folder:
        _write(folder, CONFIG, _config(adapter, settings), tensors)
        if head:
            config = _config(adapter, None)
            labels = getattr(adapter.model.config, "num_labels", None)
            _write(folder, HEAD, config | {"num_labels": labels}, head)
    return target


def content(adapter: Adapter) -> Content:
    """Returns AdapterHub's settings of an adapter, and its tensors by AdapterHub's names.

    Raises:
        FormatError: AdapterHub can't compute it.
    """
    kind = adapter.anatomy.model_type
    try:
        if kind not in paths.KNOWN:
            raise FormatError(
                f"AdapterHub's names in models of type {kind} aren't known here; known are "
                f"{', '.join(paths.KNOWN)}."
            )
        _check_values(adapter)
        return _content(adapter)
    except FormatError as error:
        raise FormatError(f'Adapter "{adapter.name}" in AdapterHub\'s form: {error}') from None


def _content(adapter: Adapter) -> Content:
    if isinstance(adapter.method, Hybrid):
        parts = [_content(share) for share in adapter.method.alone(adapter)]
        tensors = {name: tensor for _, own in parts for name, tensor in own.items()}
        return {"architecture": "union", "configs": [settings for settings, _ in parts]}, tensors
    parts = (bottleneck_writing, low_rank_writing, prefix_writing, prompt_writing, reft_writing)
    for part in parts:
        found = part.content(adapter)
        if found is not None:
            return found
    raise FormatError(f"{adapter.method.name} can't be written so.")


def _check_values(adapter: Adapter) -> None:
    """Raises if it changes tensors of the base that are in no head."""
    others = [
        graft.place.key
        for graft in adapter.grafts
        if isinstance(graft.delta, OwnValue) and not is_in(graft.place.module, adapter.head_names)
    ]
    if others:
        raise FormatError(
            f"it has values of its own for {listed(sorted(others))}, which AdapterHub keeps frozen."
        )


def _head(adapter: Adapter) -> dict[str, Tensor]:
    return {
        graft.place.key: graft.delta.value.detach()
        for graft in adapter.grafts
        if isinstance(graft.delta, OwnValue)
    }


def _config(adapter: Adapter, settings: Mapping[str, Any] | None) -> dict[str, Any]:
    model: Any = adapter.model
    config = {
        "config": settings,
        "hidden_size": getattr(model.config, "hidden_size", None),
        "model_class": type(model).__name__,
        "model_name": base_name(model) or None,
        "model_type": adapter.anatomy.model_type,
        "name": adapter.name,
        "version": VERSION,
    }
    labels = getattr(model.config, "label2id", None)
    return config if settings is not None else config | {"label2id": labels, "name": None}


def _write(
    folder: Path, name: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    text = json.dumps(config, indent=2, sort_keys=True)
    (folder / name).write_text(text, encoding="utf-8")
    write_tensors(folder / WEIGHTS[name][0], tensors)
