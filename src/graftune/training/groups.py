"""What the optimizer gets: learning rates a method asks for, and no decay of vectors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from graftune.anatomy.modules import is_in

if TYPE_CHECKING:
    from graftune.adapter import Adapter


def decays(parameter: nn.Parameter) -> bool:
    """Whether weight decay is for it: a matrix yes; biases, norms, gates and scales are vectors."""
    return parameter.ndim >= 2


def parameter_groups(
    model: nn.Module,
    adapters: Iterable[Adapter],
    *,
    lr: float,
    weight_decay: float,
    head_lr: float | None = None,
) -> list[dict[str, Any]]:
    """Returns optimizer groups of all trainable parameters, each in exactly one.

    A method's own groups (LoRA+: B learns faster than A) keep their settings; each group is split
    into what decays and what doesn't, unless it says itself how much.

    Args:
        model: what trains.
        adapters: those that train.
        lr: of what no group has its own for.
        weight_decay: of matrices.
        head_lr: of heads that train with the adapters; None takes `lr`.
    """
    adapters = list(adapters)
    heads = [] if head_lr is None else [{"params": trained_heads(adapters), "lr": head_lr}]
    own = [
        group for adapter in adapters for group in adapter.method.param_groups(adapter, lr) or ()
    ]
    groups = list(_each_once([*heads, *own, {"params": model.parameters()}]))
    split = [part for group in groups for part in _split(group, weight_decay)]
    return [group for group in split if group["params"]]


def trained_heads(adapters: Iterable[Adapter]) -> list[nn.Parameter]:
    """Returns the tensors of the heads that train with some adapters."""
    return [
        parameter
        for adapter in adapters
        for name, parameter in adapter.named_parameters()
        if parameter.requires_grad and is_in(name, adapter.head_names)
    ]


def _each_once(groups: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yields the groups with what trains, and is in none before."""
    taken: set[int] = set()
    for group in groups:
        left = [p for p in group["params"] if p.requires_grad and id(p) not in taken]
        taken |= {id(p) for p in left}
        yield {**group, "params": left}


def _split(group: dict[str, Any], weight_decay: float) -> list[dict[str, Any]]:
    if "weight_decay" in group:
        return [group]
    parameters: Sequence[nn.Parameter] = group["params"]
    return [
        {**group, "params": [p for p in parameters if decays(p)], "weight_decay": weight_decay},
        {**group, "params": [p for p in parameters if not decays(p)], "weight_decay": 0.0},
    ]
