"""Quantised tensors, told from what they are: how many numbers one stands for, and what it takes.

A quantiser keeps codes in place of numbers, with the scales that turn them back beside them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import prod
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn


def is_packed(tensor: Tensor) -> bool:
    """Whether a tensor holds codes: integers, numbers of 8 bits, or a quantiser's own class."""
    if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
        return True
    return type(tensor).__module__.startswith("torchao")


def form_of(tensors: Iterable[Tensor]) -> str | None:
    """Returns how the first packed one of some tensors is kept, such as "nf4"; None for none."""
    packed = next((tensor for tensor in tensors if is_packed(tensor)), None)
    if packed is None:
        return None
    kind = type(packed)
    if kind.__module__.startswith("torchao"):
        return f"torchao {kind.__name__}"
    state: Any = getattr(packed, "quant_state", None)
    return state.quant_type if state is not None else str(packed.dtype).removeprefix("torch.")


def elements(tensor: Tensor) -> int:
    """Returns how many numbers a tensor stands for: two a byte, where it is packed so.

    Of a parameter that ZeRO-3 shards, which is empty between steps, it is those of all processes.
    """
    state = getattr(tensor, "quant_state", None)
    if state is not None:
        return prod(state.shape)
    return int(getattr(tensor, "ds_numel", tensor.numel()))


def stored_bytes(model: nn.Module) -> int:
    """Returns the bytes of all parameters as they lie in memory, scales and tables included."""
    parts = {
        part.data_ptr(): part.nbytes
        for module in model.modules()
        for tensor in module._parameters.values()
        if tensor is not None
        for part in stored_parts(module, tensor)
    }
    return sum(parts.values())


def stored_parts(host: nn.Module, tensor: Tensor) -> Iterator[Tensor]:
    """Yields the plain tensors that one of a host's parameters is kept as."""
    flatten: Any = getattr(tensor, "__tensor_flatten__", None)
    if flatten is not None:  # torchao's classes say what they hold
        for name in flatten()[0]:
            yield getattr(tensor, name)
        return
    yield tensor.data
    scales: Any = getattr(tensor, "quant_state", None)
    while scales is not None:
        yield from (scales.absmax, scales.code)
        if scales.offset is not None:
            yield scales.offset
        scales = scales.state2 if scales.nested else None
    if not tensor.is_floating_point():  # bitsandbytes' int8 moves its scales to the host's state
        kept = getattr(tensor, "SCB", None), getattr(getattr(host, "state", None), "SCB", None)
        yield from (scale for scale in kept if scale is not None)
