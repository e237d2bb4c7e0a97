"""Two models that only read their weights hold those that are equal once."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def share_twins(model: Any, other: Any) -> int:
    """Makes a model's parameters that another has under the same name its own, where equal.

    Tied parameters stay tied; the other model is left as it is. Neither may be trained afterwards.

    Returns:
        The bytes that are held once since.
    """
    every = list(model.named_parameters(remove_duplicate=False))
    known = dict(other.named_parameters(remove_duplicate=False))
    made: dict[int, nn.Parameter] = {}
    saved = 0
    for name, old in every:
        twin = known.get(name)
        if id(old) not in made and twin is not None and _are_equal(old, twin):
            made[id(old)] = nn.Parameter(twin.detach(), requires_grad=old.requires_grad)
            saved += old.numel() * old.element_size()
    for name, old in every:
        if id(old) in made:
            owner, _, leaf = name.rpartition(".")
            model.get_submodule(owner)._parameters[leaf] = made[id(old)]
    return saved


def body_of(model: Any, names: dict[str, torch.Size]) -> Any | None:
    """Returns a model's body if it has exactly these parameters; None otherwise."""
    body = model.base_model
    found = {name: tensor.shape for name, tensor in body.named_parameters()}
    return body if body is not model and found == names else None


def _are_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    same_kind = (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
    return same_kind and torch.equal(one, other)
