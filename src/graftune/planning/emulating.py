"""What CUDA's kernels and autocast do otherwise than the CPU's, for plans without such a device.

A torch without CUDA can't make tensors that stand for some on a GPU, so a plan for one runs on the
CPU's, and four things are put right, since they change what is kept:

- attention takes the flash kernel in 16 bits without a mask, else the memory-efficient one;
- dropout keeps a byte for each value, not a float;
- autocast computes norms, softmax, losses and sums in float32;
- optimizers step through lists of tensors at once (`optimizers.py`).
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from graftune.planning.settings import PlanSettings

WIDE = frozenset(
    {
        *("layer_norm", "native_layer_norm", "group_norm", "rms_norm", "softmax", "log_softmax"),
        *("cross_entropy", "nll_loss", "mse_loss", "l1_loss", "binary_cross_entropy_with_logits"),
        *("sum", "prod", "cumsum", "cumprod", "pow", "exp", "expm1", "log", "log1p", "log2"),
        *("rsqrt", "reciprocal", "norm", "cosine_similarity", "softplus", "logsumexp"),
    }
)
"""Operations that CUDA's autocast computes in float32 (torch's table of its op lists)."""
_ALIGNED = 8


def autocast(settings: PlanSettings, device: str) -> Any:
    """Returns the block in which a mixed-precision step runs its forward pass."""
    if settings.precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device, dtype=getattr(torch, settings.precision))


class CudaLike(TorchFunctionMode):
    """Calls what a GPU would run in place of the CPU's operations."""

    def __init__(self, settings: PlanSettings) -> None:
        super().__init__()
        self.casts = settings.precision != "float32"

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs a function, or what stands for it."""
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            return attention(*args, **kwargs)
        if func is functional.dropout:
            return dropout(*args, **kwargs)
        if (
            self.casts
            and getattr(func, "__name__", "") in WIDE
            and torch.is_autocast_enabled("cpu")
        ):
            args = tuple(_widened(one) for one in args)
        return func(*args, **kwargs)


def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Drops values as CUDA does, which keeps a byte of each."""
    return torch.native_dropout(input, p, True)[0] if training and p else input


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Computes attention by the kernel that CUDA would choose."""
    if enable_gqa and key.shape[1] != query.shape[1]:
        times = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    ops: Any = torch.ops.aten
    if attn_mask is None and query.dtype != torch.float32:
        found = ops._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, scale=scale
        )
        return found[0]
    bias = None if attn_mask is None else _bias(attn_mask, query, key)
    found = ops._scaled_dot_product_efficient_attention(
        query, key, value, bias, _needs_grad(query, key, value), dropout_p, is_causal, scale=scale
    )
    return found[0]


def _bias(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Returns the mask as the kernel takes it: numbers, rows padded to a multiple of 8."""
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(mask.logical_not(), -1e4)
    tokens = key.shape[-2]
    if tokens % _ALIGNED:
        mask = functional.pad(mask, (0, -tokens % _ALIGNED))[..., :tokens]
    return mask.to(query.dtype).expand(*query.shape[:2], query.shape[-2], tokens)


def _needs_grad(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(one.requires_grad for one in tensors)


def _widened(value: Any) -> Any:
    is_narrow = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if is_narrow else value
