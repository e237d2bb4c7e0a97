"""What the optimizer gets: learning rates a method asks for, and no decay of vectors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from graftune.adapter import Adapter


def decays(parameter: nn.Parameter) -> bool:
    """Whether weight decay is for it: a matrix yes; biases, norms, gates and scales are vectors."""
    return parameter.ndim >= 2


def parameter_groups(
    model: nn.Module, adapters: Iterable[Adapter], *, lr: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Returns optimizer groups of all trainable parameters, each in exactly one.

    A method's own groups (LoRA+: B learns faster than A) keep their settings; each group is split
    into what decays and what doesn't, unless it says itself how much.
    """
    groups = [group for adapter in adapters for group in _own(adapter, lr)]
    taken = {id(parameter) for group in groups for parameter in group["params"]}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in taken]
    split = [part for group in [*groups, {"params": rest}] for part in _split(group, weight_decay)]
    return [group for group in split if group["params"]]


def _own(adapter: Adapter, lr: float) -> list[dict[str, Any]]:
    groups = adapter.method.param_groups(adapter, lr) or []
    return [{**group, "params": _trainable(group["params"])} for group in groups]


def _trainable(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    return [parameter for parameter in parameters if parameter.requires_grad]


def _split(group: dict[str, Any], weight_decay: float) -> list[dict[str, Any]]:
    if "weight_decay" in group:
        return [group]
    parameters: Sequence[nn.Parameter] = group["params"]
    return [
        {**group, "params": [p for p in parameters if decays(p)], "weight_decay": weight_decay},
        {**group, "params": [p for p in parameters if not decays(p)], "weight_decay": 0.0},
    ]
