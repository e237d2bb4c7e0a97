"""A sparse change of the model's own tensors: theta plus values at chosen entries.

    theta' = theta;   theta'[positions] += values         positions fixed, values trained

Values start at zero. Identity at init: yes, bit for bit. Merge: theta'. An entry takes six bytes:
its value in float32 and the low 16 bits of its flat position; how many entries lie in each block of
65,536 positions tells the high bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from graftune.errors import SettingsError
from graftune.sites import hosts
from graftune.sites.base import Graft, ParameterDelta, ParameterPlace

BLOCK = 1 << 16
"""Positions whose entries are counted together."""


class SparseChange(ParameterDelta):
    """theta + values at some of its entries, on theta and every tensor tied to it.

    Shapes: values (entries,) float32; index (entries,) int16, the low 16 bits of the ascending flat
    positions; blocks (ceil(size / 65,536),) int32, the entries in each block of positions.
    """

    values: nn.Parameter
    index: Tensor
    blocks: Tensor

    def __init__(self, values: Tensor, index: Tensor, blocks: Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(values)
        self.register_buffer("index", index)
        self.register_buffer("blocks", blocks)

    @classmethod
    def at(cls, positions: Tensor, values: Tensor, size: int) -> SparseChange:
        """Returns a change of a tensor of `size` entries at ascending flat positions."""
        blocks = torch.bincount(positions // BLOCK, minlength=-(-size // BLOCK))
        low = (positions % BLOCK).to(torch.int32).to(torch.int16)  # wraps: bits, not a number
        return cls(values, low.to(values.device), blocks.to(values.device, torch.int32))

    def positions(self) -> Tensor:
        """Returns the flat positions, `(entries,)` int64, ascending."""
        block = torch.arange(len(self.blocks), device=self.blocks.device)
        high = block.repeat_interleave(self.blocks, output_size=len(self.index))
        return high * BLOCK + (self.index.to(torch.int64) & (BLOCK - 1))

    def changes(self, size: int) -> int:
        """See `Delta.changes`."""
        return len(self.values)

    def forward(self, value: Tensor | None, base: Tensor | None) -> Tensor:
        """See `ParameterDelta.forward`: sums in float32, rounded once to the host's type."""
        assert value is not None
        return added(value, self.positions(), self.values) if len(self.values) else value


def added(value: Tensor, at: Tensor, values: Tensor) -> Tensor:
    """Returns a copy of `value` with values added at flat positions, summed in their own type."""
    flat = value.reshape(-1)
    moved = flat.index_select(0, at).to(values.dtype) + values
    return flat.index_copy(0, at, moved.to(value.dtype)).view(value.shape)


def budget(keep: float, size: int) -> int:
    """Returns floor(keep * size), exactly for the decimal number that `keep` is written as."""
    return math.floor(Fraction(str(keep)) * size)


def check_budget(method: str, keep: float, size: int) -> int:
    """Returns the budget.

    Raises:
        SettingsError: not one entry would be kept.
    """
    count = budget(keep, size)
    if not count:
        raise SettingsError(
            f"{method}: keep={keep:g} of {size:,} entries is less than one: keep at least "
            f"{1 / size:.2g}."
        )
    return count


def largest(scores: Callable[[], Iterable[Tensor]], count: int) -> list[Tensor]:
    """Returns where the `count` largest scores of several tensors together are.

    Exactly so many; among equals the first are taken. One tensor at a time is looked at.

    Args:
        scores: gives the tensors, without a NaN; called twice.
        count: at most as many as there are entries.

    Returns:
        For each tensor the ascending flat positions, int64.
    """
    best: Tensor | None = None
    for score in scores():
        flat = score.reshape(-1)
        flat = flat if best is None else torch.cat([best, flat.to(best.device)])
        best = flat.topk(min(count, len(flat)), sorted=False).values
    assert best is not None
    least = best.min()
    left = count - int((best > least).sum())
    found: list[Tensor] = []
    for score in scores():
        flat, bar = score.reshape(-1), least.to(score.device)
        chosen = flat > bar
        ties = (flat == bar).nonzero().flatten()[:left]
        left -= len(ties)
        chosen[ties] = True
        found.append(chosen.nonzero().flatten())
    return found


def spread(sizes: Sequence[int], count: int) -> list[Tensor]:
    """Returns positions in tensors of these sizes, `count` in all, evenly spread: placeholders."""
    total, before, found = sum(sizes), 0, list[Tensor]()
    for size in sizes:
        here = count * (before + size) // total - count * before // total
        found.append(torch.arange(here) * size // max(here, 1))
        before += size
    return found


def sparse_grafts(model: nn.Module, at: Mapping[str, Tensor]) -> list[Graft]:
    """Returns changes that start at zero, at positions in tensors by absolute name."""
    grafts: list[Graft] = []
    for name, positions in at.items():
        place, options = tensor_place(model, name)
        size = place.size(model.get_submodule(place.module))
        values = torch.zeros(len(positions), **options)
        grafts.append(Graft(place, SparseChange.at(positions, values, size)))
    return grafts


def saved_sparse(
    model: nn.Module, names: Iterable[str], tensors: Mapping[str, Tensor]
) -> list[Graft]:
    """Returns empty changes of the sizes that a file's tensors have.

    Args:
        model: the base.
        names: tensors that may be changed.
        tensors: the file's, by absolute name.

    Raises:
        SettingsError: a file's positions don't lie in the model's tensor.
    """
    grafts: list[Graft] = []
    for name in names:
        stored = {part: tensors.get(f"{name}.{part}") for part in ("values", "index", "blocks")}
        found = {part: tensor for part, tensor in stored.items() if tensor is not None}
        if not found:
            continue
        place, options = tensor_place(model, name)
        if len(found) == len(stored):
            _check_positions(name, place.size(model.get_submodule(place.module)), found)
        shapes = {part: () if t is None else t.shape for part, t in stored.items()}
        device = options["device"]
        delta = SparseChange(
            torch.empty(shapes["values"], **options),
            torch.empty(shapes["index"], dtype=torch.int16, device=device),
            torch.empty(shapes["blocks"], dtype=torch.int32, device=device),
        )
        grafts.append(Graft(place, delta))
    return grafts


def tensor_place(model: nn.Module, name: str) -> tuple[ParameterPlace, dict[str, Any]]:
    """Returns the place of a tensor by its absolute name, and options of new tensors there."""
    module, _, parameter = name.rpartition(".")
    options = hosts.delta_options(model.get_submodule(module), parameter)
    return ParameterPlace(module, parameter), options


def _check_positions(name: str, size: int, found: Mapping[str, Tensor]) -> None:
    values, index, blocks = found["values"], found["index"], found["blocks"]
    whole = values.shape == index.shape and len(blocks) == -(-size // BLOCK)
    if whole and int(blocks.sum()) == len(index) and not bool((blocks < 0).any()):
        positions = SparseChange(values, index, blocks).positions()
        whole = not len(positions) or int(positions[-1]) < size
        whole = whole and bool((positions.diff() > 0).all())
    else:
        whole = False
    if not whole:
        raise SettingsError(
            f'the positions of "{name}" don\'t lie in a tensor of {size:,} entries, as in this '
            "model: the file is damaged, or was made for another base."
        )
