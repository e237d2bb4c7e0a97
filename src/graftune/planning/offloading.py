"""What lies in the host's memory while it isn't used: saved activations, frozen weights."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from graftune.planning.tracking import Ledger


@contextlib.contextmanager
def activations(model: nn.Module, ledger: Ledger) -> Iterator[None]:
    """Moves what autograd saves to the host, but for the model's own tensors."""
    own = {one.untyped_storage()._cdata for one in (*model.parameters(), *model.buffers())}

    def pack(tensor: Tensor) -> tuple[Tensor, bool]:
        if tensor.untyped_storage()._cdata in own:
            return tensor, False
        moved = torch.empty_like(tensor)
        ledger.move_to_host(moved)
        return moved, True

    def unpack(packed: tuple[Tensor, bool]) -> Tensor:
        tensor, is_moved = packed
        return torch.empty_like(tensor) if is_moved else tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


@contextlib.contextmanager
def parameters(model: nn.Module) -> Iterator[None]:
    """Brings a module's frozen weights to the device while it computes, forward and backward."""
    held: dict[int, list[Tensor]] = {}

    def fetch(module: nn.Module, *_: Any) -> None:
        frozen = [one for one in module.parameters(recurse=False) if not one.requires_grad]
        held[id(module)] = [torch.empty_like(one) for one in frozen]

    def drop(module: nn.Module, *_: Any) -> None:
        held.pop(id(module), None)

    handles: list[Any] = []
    for module in model.modules():
        if any(not one.requires_grad for one in module.parameters(recurse=False)):
            handles += [
                module.register_forward_pre_hook(fetch, prepend=True),
                module.register_forward_hook(drop),
                module.register_full_backward_pre_hook(fetch),
                module.register_full_backward_hook(drop),
            ]
    try:
        with warnings.catch_warnings():  # of first modules, whose inputs need no gradient
            warnings.filterwarnings("ignore", "Full backward hook")
            yield
    finally:
        for handle in handles:
            handle.remove()
