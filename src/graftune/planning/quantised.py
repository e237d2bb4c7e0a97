"""Linears whose weights are kept in 8 or 4 bits and widened while they compute."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from graftune.adapter import Adapter
from graftune.planning.settings import PlanSettings

BLOCK, SUPERBLOCK = 64, 256
"""Values that share a scale of nf4, and scales that share one when they are quantised too."""


def packed_bytes(rows: int, columns: int, settings: PlanSettings) -> int:
    """Returns the bytes of a quantised weight with its scales.

    int8: a byte each and a float32 scale for each row. nf4, fp4: half a byte each and a float32
    scale for every 64; quantised twice, a byte for every 64 and a float32 for every 256 of them.
    """
    count = rows * columns
    if settings.quantize == "int8":
        return count + 4 * rows
    scales = -(-count // BLOCK)
    if settings.double_quant:
        return -(-count // 2) + scales + 4 * -(-scales // SUPERBLOCK) + 4
    return -(-count // 2) + 4 * scales


class _Widened(torch.autograd.Function):
    """y = x W^T, W widened for the product and again for its gradient, never kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, shape: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.shape, ctx.dtype = shape, x.dtype
        return functional.linear(x, torch.empty(shape, dtype=x.dtype, device=x.device))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,) = grads
        (packed,) = ctx.saved_tensors
        weight = torch.empty(ctx.shape, dtype=ctx.dtype, device=packed.device)
        return grad @ weight, None, None


def quantise(model: nn.Module, adapter: Adapter, settings: PlanSettings) -> None:
    """Replaces the weights of the blocks' frozen linears by packed bytes."""
    if settings.quantize is None:
        return
    dtype = getattr(torch, settings.precision)
    for name, module in model.named_modules():
        is_linear = isinstance(module, nn.Linear) or hasattr(module, "nf")
        if not is_linear or not _is_in_block(name, adapter) or module.weight.requires_grad:
            continue
        _pack(module, settings, dtype)


def _is_in_block(name: str, adapter: Adapter) -> bool:
    paths = (block.path for stack in adapter.anatomy.stacks for block in stack.blocks)
    return any(name.startswith(f"{path}.") for path in paths)


def _pack(module: Any, settings: PlanSettings, dtype: torch.dtype) -> None:
    weight: Tensor = module.weight
    is_turned = hasattr(module, "nf")
    rows, columns = (weight.shape[1], weight.shape[0]) if is_turned else tuple(weight.shape)
    size = packed_bytes(int(rows), int(columns), settings)
    packed = torch.empty(size, dtype=torch.uint8, device=weight.device)
    module.weight = nn.Parameter(packed, requires_grad=False)

    def forward(x: Tensor) -> Tensor:
        y: Tensor = _Widened.apply(x.to(dtype), module.weight, (int(rows), int(columns)))  # type: ignore[assignment]
        return y if module.bias is None else y + module.bias.to(y.dtype)

    module.forward = forward
