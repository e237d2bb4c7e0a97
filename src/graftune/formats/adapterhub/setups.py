"""Setups: a composition, its adapters and fusions, each in a folder of its own below."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from graftune import adapter as adapters
from graftune.composition import Average, Composition, Fuse, Parallel, Rows, Stack
from graftune.errors import FormatError
from graftune.formats.adapterhub import loading
from graftune.formats.adapterhub.folder import FUSION, SETUP
from graftune.formats.adapterhub.loading import Choices, Saved
from graftune.formats.directory import CONFIG, read_json

if TYPE_CHECKING:
    from graftune.adapter import Adapter


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """A setup as it lies in a directory."""

    composition: Composition
    parts: tuple[Saved, ...]
    """Its adapters, then its fusions."""


def read(folder: Path, where: str, *, allow_pickle: bool, head: bool) -> Setup | None:
    """Returns the setup in a directory; None where it holds none.

    Raises:
        FormatError: a file is missing or broken, or a composition that there isn't here.
    """
    config = read_json(folder, SETUP)
    if config is None:
        return None
    given = config.get("adapter_setup")
    if not isinstance(given, dict):
        raise FormatError(f'{where}: its {SETUP} has no "adapter_setup".')
    below = sorted(entry for entry in folder.iterdir() if entry.is_dir())
    inside = [f for f in below if (f / CONFIG).is_file()]
    inside += [f for f in below if (f / FUSION).is_file()]
    return Setup(
        composition=_composition(given, where),
        parts=tuple(
            loading.read(part, f'"{part}"', allow_pickle=allow_pickle, head=head) for part in inside
        ),
    )


def load(model: nn.Module, setup: Setup, choices: Choices) -> Adapter:
    """Attaches all adapters of a setup, activates its composition, and returns the last of them.

    Raises:
        FormatError: one of them can't be loaded; none is attached then.
    """
    state = model.__dict__.get(adapters.STATE)
    before = None if state is None else state.active.plan
    loaded: list[Adapter] = []
    try:
        for part in setup.parts:
            loaded.append(loading.load(model, part, part.folder.name, choices))
        adapters.activate(model, setup.composition)
    except Exception:
        if loaded:
            adapters.activate(model, None)
        for adapter in reversed(loaded):
            adapters.detach(model, adapter.name)
        if before is not None and loaded:
            adapters.activate(model, before.composition, drop=before.schedule)
        raise
    return loaded[-1]


def _composition(given: Mapping[str, Any], where: str) -> Any:
    """Returns a composition of AdapterHub's as ours."""
    kind, children = given.get("type"), given.get("children") or []
    if kind == "single":
        return str(children[0])
    make = _MAKERS.get(str(kind))
    if make is None:
        raise FormatError(
            f'{where} is composed by "{kind}", which there isn\'t here; known are '
            f"{', '.join(_MAKERS)}."
        )
    options = given.get("kwargs") or {}
    return make([_composition(child, where) for child in children], options, where)


def _rows(members: list[Any], options: Mapping[str, Any], where: str) -> Rows:
    sizes = options.get("batch_sizes", 1)
    sizes = [sizes] * len(members) if isinstance(sizes, int) else list(sizes)
    return Rows(list(_repeated(members, sizes)))


def _repeated(members: list[Any], sizes: list[int]) -> Iterator[Any]:
    for member, size in zip(members, sizes, strict=True):
        yield from [member] * size


def _average(members: list[Any], options: Mapping[str, Any], where: str) -> Average:
    warnings.warn(
        f"{where} is an Average, which AdapterHub divides by the number of members once more than "
        "its weights say; here it is the mean.",
        stacklevel=2,
    )
    weights = options.get("weights") or [1.0] * len(members)
    whole = sum(weights) if options.get("normalize_weights", True) else 1.0
    return Average(*members, weights=[weight / whole for weight in weights])


_MAKERS: dict[str, Callable[[list[Any], Mapping[str, Any], str], Any]] = {
    "Stack": lambda members, options, where: Stack(*members),
    "Fuse": lambda members, options, where: Fuse(*members),
    "Parallel": lambda members, options, where: Parallel(*members),
    "BatchSplit": _rows,
    "Average": _average,
}
