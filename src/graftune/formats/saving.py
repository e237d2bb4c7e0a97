"""Writing an adapter's directory: HF PEFT's two files, ours, and the card, whole or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import graftune
from graftune import processes
from graftune.errors import FormatError
from graftune.formats import directory, peft_types
from graftune.formats.atomic import replacing
from graftune.formats.base import base_name, fingerprint, probed
from graftune.formats.card import CardFacts, render
from graftune.formats.factors import Slice, slices
from graftune.formats.inspecting import PEFT_TYPES
from graftune.formats.peft_common import PREFIX
from graftune.formats.tensors import listed, read_tensors, write_tensors
from graftune.sites import shards
from graftune.sites.parameter import OwnValue

if TYPE_CHECKING:
    from graftune.adapter import Adapter


def save(adapter: Adapter, path: str | Path) -> Path:
    """Writes an adapter's directory and returns its path.

    An existing directory is replaced in one step; what else lies in it is kept. The same adapter
    gives the same bytes. Of a model that FSDP2 or ZeRO-3 shards, every process calls it, and the
    first one writes.

    Raises:
        FormatError: the path can't be written, or the adapter holds no numbers (meta device).
    """
    if not any(shards.is_sharded(p) for p in adapter.parameters()):
        return _write(adapter, path)
    with whole(adapter):
        if processes.is_first():
            _write(adapter, path)
    processes.wait()
    return Path(path)


def _write(adapter: Adapter, path: str | Path) -> Path:
    target, kind = Path(path), peft_types.writer(adapter)
    named = file_tensors(adapter).items()
    tensors = {PREFIX + k if kind is None else kind.key(k): tensor for k, tensor in named}
    with replacing(target) as folder:
        write_tensors(folder / directory.WEIGHTS, tensors)
        if processes.count() > 1:
            _check_written(folder / directory.WEIGHTS, tensors)
        write_config(adapter, folder)
    return target


@contextlib.contextmanager
def whole(adapter: Adapter, *, write: bool = False) -> Iterator[None]:
    """Lets all that an adapter's directory tells be whole in this process while the block runs.

    Where FSDP2 or ZeRO-3 shards the model, every process enters it, and one saves inside.

    Args:
        adapter: what is saved or filled.
        write: the block fills the adapter's tensors, in every process alike.
    """
    model = adapter.model
    own = [m for graft in adapter.grafts for m in graft.delta.modules()]
    places = shards.slots(model.modules() if adapter.method.trains_in_place else own)
    if not write and not _changed(adapter):
        for name in probed(model, adapter.head_names):
            module, _, parameter = name.rpartition(".")
            places.append((model.get_submodule(module), parameter))
    with shards.gathered(places, write=write):
        yield


def _check_written(path: Path, tensors: dict[str, Tensor]) -> None:
    """Checks that a file of gathered tensors holds what was in memory, and numbers alone."""
    read = read_tensors(path)
    for name, tensor in tensors.items():
        found = read.get(name)
        if found is None or found.shape != tensor.shape or found.dtype != tensor.dtype:
            what = "nothing" if found is None else f"{tuple(found.shape)} of {found.dtype}"
            raise FormatError(
                f'"{path}" has {what} for {name}, expected {tuple(tensor.shape)} of {tensor.dtype}.'
            )
        if not torch.equal(found, tensor.detach().cpu()):
            why = "differs from what was in memory"
            bad = not bool(torch.isfinite(tensor.detach()).all())
            raise FormatError(f'"{path}": {name} {"is not finite" if bad else why}.')


def file_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """Returns the tensors of an adapter's file, without PEFT's prefix "base_model.model."."""
    kind = peft_types.writer(adapter)
    named = adapter.state_dict() if kind is None else kind.tensors(adapter)
    unreal = sorted(name for name, tensor in named.items() if tensor.is_meta)
    if unreal:
        raise FormatError(
            f'Adapter "{adapter.name}" is on the meta device and has no numbers to save: '
            f"{listed(unreal)}."
        )
    return named


def file_config(adapter: Adapter) -> dict[str, Any]:
    """Returns the content of adapter_config.json."""
    kind = peft_types.writer(adapter)
    if kind is not None:
        return kind.config(adapter)
    settings = {k: v for k, v in adapter.method.to_dict().items() if k != "method"}
    return {
        **settings,
        "peft_type": _type_name(adapter.method.name),
        "base_model_name_or_path": base_name(adapter.model) or None,
        "inference_mode": True,
        "modules_to_save": list(adapter.head_names) or None,
        "task_type": None,
    }


def _type_name(method: str) -> str:
    """Returns a `peft_type` that isn't one of PEFT's, so that PEFT says it doesn't know it."""
    name = method.upper()
    return f"GRAFTUNE_{name}" if name in PEFT_TYPES else name


def write_config(adapter: Adapter, folder: str | Path) -> None:
    """Writes the files beside the tensors into an existing folder."""
    place, config = Path(folder), file_config(adapter)
    _write_json(place / directory.CONFIG, config)
    _write_json(place / directory.OWN, own_config(adapter))
    card = render(_facts(adapter, config))
    (place / directory.CARD).write_text(card, encoding="utf-8")


def own_config(adapter: Adapter) -> dict[str, Any]:
    """Returns the content of graftune.json: what PEFT's file has no place for."""
    values = sorted(name for name, _ in adapter.named_tensors())
    return {
        "format_version": directory.FORMAT_VERSION,
        "graftune_version": graftune.__version__,
        "method": adapter.method.to_dict(),
        "heads": list(adapter.head_names),
        "values": {
            graft.place.key: graft.delta.shared
            for graft in adapter.grafts
            if isinstance(graft.delta, OwnValue)
        },
        "slices": _grouped(slices(adapter.grafts)),
        "base": fingerprint(adapter.model, skip=adapter.head_names, changed=_changed(adapter)),
        "parameters": adapter.count(),
        "tensors": len(values),
        "peft": peft_types.writer(adapter) is not None,
    }


def _grouped(parts: dict[str, list[Slice]]) -> list[dict[str, Any]]:
    """Returns the slices with the modules that are cut alike, as blocks are, named together."""
    groups: dict[tuple[Slice, ...], list[str]] = {}
    for module, cuts in parts.items():
        groups.setdefault(tuple(cuts), []).append(module)
    return [
        {"modules": modules, "parts": [dataclasses.asdict(part) for part in cuts]}
        for cuts, modules in groups.items()
    ]


def _changed(adapter: Adapter) -> bool:
    """Whether the base's weights aren't what they were: trained in place, or merged into."""
    state = adapter.model.__dict__.get("_graftune")
    merged = state is not None and state.merged is not None
    return adapter.method.trains_in_place or merged


def _facts(adapter: Adapter, config: dict[str, Any]) -> CardFacts:
    import transformers

    from graftune.counting import summary

    counted = summary(adapter.model)
    sites = [site for site in counted.sites if site.adapter == adapter.name]
    ranks = [site.rank for site in sites if site.kind != "head"]
    bounded = [rank for rank in ranks if rank is not None]
    return CardFacts(
        name=adapter.name,
        method=adapter.method.name,
        paper=adapter.method.paper,
        settings=adapter.method.to_dict(),
        base=base_name(adapter.model),
        model_class=type(adapter.model).__name__,
        task=config.get("task_type"),
        peft=peft_types.writer(adapter) is not None,
        trainable=adapter.count(),
        changed=sum(site.changed for site in sites),
        rank=max(bounded) if bounded and len(bounded) == len(ranks) else None,
        base_parameters=counted.base,
        heads=adapter.head_names,
        size=sum(tensor.nbytes for tensor in file_tensors(adapter).values()),
        versions={
            "graftune": graftune.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
