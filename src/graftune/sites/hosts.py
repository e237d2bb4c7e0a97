"""The modules that sites sit on, read alike: plain, transposed, embedding, convolution, quantised.

A weight is always seen as `(out_features, in_features, ...)`; an embedding as `(dim, vocabulary)`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from graftune.anatomy.packed import is_packed
from graftune.errors import AdapterError
from graftune.sites import quantised

HostKind = Literal["linear", "embedding", "conv", "tensor"]


def is_transposed(host: nn.Module) -> bool:
    """Whether the weight is kept as (in, out): transformers' Conv1D, known by its nf."""
    return hasattr(host, "nf") and getattr(host, "weight", torch.empty(0)).ndim == 2


def kind_of(host: nn.Module, parameter: str = "weight") -> HostKind:
    """Returns what sort of map the module's tensor is."""
    if parameter != "weight":
        return "tensor"
    if isinstance(host, nn.Embedding):
        return "embedding"
    if isinstance(host, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return "conv"
    return "linear"


def is_quantised(host: nn.Module) -> bool:
    """Whether the module's weight is kept as codes, not as numbers."""
    weight = getattr(host, "weight", None)
    return isinstance(weight, Tensor) and is_packed(weight)


def features(host: nn.Module) -> tuple[int, int]:
    """Returns (in, out): widths of a linear, (vocabulary, dim) of an embedding, channels."""
    if isinstance(host, nn.Embedding):
        return host.num_embeddings, host.embedding_dim
    if isinstance(host, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return host.in_channels // host.groups, host.out_channels
    if hasattr(host, "in_features"):
        return int(cast(int, host.in_features)), int(cast(int, host.out_features))
    first, second = cast(Tensor, host.weight).shape[:2]
    return (first, second) if is_transposed(host) else (second, first)


def has_turned_experts(host: nn.Module) -> bool:
    """Whether the module keeps its experts' weights as (experts, in, out), as gpt-oss does."""
    return bool(getattr(host, "is_transposed", False))


def expert_sizes(host: nn.Module, parameter: str) -> tuple[int, int, int]:
    """Returns (experts, out, in) of a 3-D tensor of experts' weights, whichever way it lies."""
    experts, out, fan_in = getattr(host, parameter).shape
    return (experts, fan_in, out) if has_turned_experts(host) else (experts, out, fan_in)


def embedding_scale(host: nn.Module) -> Tensor | float:
    """Returns the factor by which some embeddings multiply their rows (Gemma's sqrt(d)), else 1."""
    scale = getattr(host, "embed_scale", None)
    return 1.0 if scale is None else scale


def oriented(host: nn.Module, weight: Tensor) -> Tensor:
    """Returns a view of a weight as (out, in, ...), or back: the same turn both ways."""
    return weight.t() if is_transposed(host) or isinstance(host, nn.Embedding) else weight


def read(host: nn.Module, parameter: str = "weight") -> Tensor:
    """Returns the host's present weight as (out, in, ...), in its own dtype.

    A quantised weight is returned as the numbers that its codes stand for.

    Raises:
        AdapterError: if the host is quantised by something unknown, or accelerate keeps its
            weight elsewhere.
    """
    check_here(host, parameter)
    if parameter == "weight" and is_quantised(host):
        return quantised.numbers(host)
    value = getattr(host, parameter)
    return oriented(host, value) if parameter == "weight" else value


def row_index(rows: Iterable[tuple[int, int]], device: torch.device | None = None) -> Tensor:
    """Returns the rows that half-open ranges hold, `(rows,)` int64, in the ranges' order.

    >>> row_index([(4, 6), (0, 2)])
    tensor([4, 5, 0, 1])
    """
    return torch.cat([torch.arange(start, stop, device=device) for start, stop in rows])


def delta_options(host: nn.Module, parameter: str = "weight") -> dict[str, Any]:
    """Returns device and dtype for new trainable tensors: fp32 over 16-bit and quantised hosts."""
    tensor = getattr(host, parameter, None)
    if tensor is None:
        tensor = next(host.parameters())
    wide = not is_packed(tensor) and tensor.dtype.itemsize >= 4
    return {"device": home(host, tensor), "dtype": tensor.dtype if wide else torch.float32}


def home(host: nn.Module, tensor: Tensor) -> torch.device:
    """Returns where a host computes: where its tensor is, or where accelerate brings it for that.

    Args:
        host: a module, or one around it.
        tensor: one of its.
    """
    if not tensor.is_meta:
        return tensor.device
    devices = (d for module in host.modules() if (d := _brought_to(module)) is not None)
    return next(devices, tensor.device)


def is_elsewhere(host: nn.Module) -> bool:
    """Whether accelerate keeps a module's own weights on disk, or another device, between calls."""
    return _brought_to(host) is not None and any(p.is_meta for p in host.parameters(recurse=False))


def check_here(host: nn.Module, parameter: str) -> None:
    """Raises AdapterError if accelerate keeps a tensor elsewhere that must be read or changed."""
    if is_elsewhere(host):
        raise AdapterError(
            f"The {parameter} of a {type(host).__name__} is kept on disk or in another memory by "
            "accelerate (device_map) and can't be read or changed here: load the base without "
            "offloading, or take what stays beside the weights, such as gt.LoRA, unmerged."
        )


def _brought_to(module: nn.Module) -> torch.device | None:
    """Returns the device that a hook of accelerate brings a module's offloaded weights to."""
    hook: Any = module.__dict__.get("_hf_hook")
    for one in getattr(hook, "hooks", (hook,)):
        if getattr(one, "offload", False) and getattr(one, "execution_device", None) is not None:
            return torch.device(one.execution_device)
    return None
