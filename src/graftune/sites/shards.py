"""Tensors of which each process holds a part: FSDP2's and DeepSpeed ZeRO-3's, made whole.

FSDP2 keeps a parameter as a `DTensor` while its module doesn't run, ZeRO-3 as an empty tensor with
its part beside it. Gathering is collective: every process must ask for the same, in the same order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

Slot = tuple[nn.Module, str]
"""Where a parameter lies: its module and its name there."""
_open: set[int] = set()
"""Ids of ZeRO-3's parameters that an outer block gathered: whole, and not to be gathered twice."""


def slots(modules: Iterable[nn.Module]) -> list[Slot]:
    """Returns where the parameters of some modules lie, without those of modules in them."""
    return [
        (module, name)
        for module in modules
        for name, tensor in module._parameters.items()
        if tensor is not None
    ]


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds only a part of a tensor."""
    return _is_dtensor(tensor) or _is_partitioned(tensor)


@contextlib.contextmanager
def gathered(places: Iterable[Slot], *, write: bool = False) -> Iterator[None]:
    """Lets parameters be whole in every process while the block runs.

    Args:
        places: where they lie; those that aren't sharded stay as they are.
        write: whether what the block writes into them is kept; it must be the same everywhere.
    """
    held = [(m, name, m._parameters[name]) for m, name in places]
    parted = [(m, n, p) for m, n, p in held if p is not None and _is_dtensor(p)]
    zero = list({id(p): p for _, _, p in held if p is not None and _is_partitioned(p)}.values())
    full: dict[int, nn.Parameter] = {}
    with _zero_gathered(zero, write=write):
        for module, name, parameter in parted:
            if id(parameter) not in full:
                whole = whole_of(parameter.detach())
                full[id(parameter)] = nn.Parameter(whole, requires_grad=parameter.requires_grad)
            module._parameters[name] = full[id(parameter)]
        try:
            yield
        finally:
            for module, name, parameter in parted:
                module._parameters[name] = parameter
    if write:
        for _, _, parameter in parted:
            put(parameter, full[id(parameter)].detach())


def whole_of(tensor: Tensor) -> Tensor:
    """Returns all of a tensor, in every process; itself if it isn't a `DTensor`."""
    found: Any = tensor
    return found.full_tensor() if _is_dtensor(tensor) else tensor


def put(target: Tensor, whole: Tensor) -> None:
    """Writes this process's part of a whole tensor into a sharded one."""
    with torch.no_grad():
        target.copy_(part_of(whole, target))


def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """Returns a whole tensor, the same in every process, sharded as another one; sends nothing."""
    if not _is_dtensor(like):
        return whole
    from torch.distributed.tensor import DTensor, Replicate

    parted: Any = like
    mesh, placements = parted.device_mesh, parted.placements
    here = whole.to(parted.device)
    same = DTensor.from_local(here, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return same.redistribute(mesh, placements)


def _is_dtensor(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def _is_partitioned(tensor: Tensor) -> bool:
    return hasattr(tensor, "ds_id") and id(tensor) not in _open


@contextlib.contextmanager
def _zero_gathered(found: list[nn.Parameter], *, write: bool) -> Iterator[None]:
    if not found:
        yield
        return
    import deepspeed  # pyright: ignore[reportMissingImports]

    zero: Any = deepspeed.zero
    own = {id(parameter) for parameter in found}
    with zero.GatheredParameters(found, modifier_rank=0 if write else None):
        _open.update(own)
        try:
            yield
        finally:
            _open.difference_update(own)
