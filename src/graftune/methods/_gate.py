"""Gates of single tokens or rows on what a delta adds (Mao et al. 2022, UniPELT, section 3.2).

    G_t = sigmoid(w x_t + b)          w (1, d), b (1); x what the delta reads

    "token"         G_t, each token by itself: the same with a cache, in batches, with padding
    "mean"          the mean of G_t over a row's real tokens
    "mean-padded"   the mean over all of a row's tokens, padding too: the authors' code, AdapterHub
    "auto"          "token" in decoders, where a mean would look ahead; "mean" elsewhere

Initial values: w ~ N(0, 0.02^2), b = 0, so that G is about 1/2.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftune.anatomy import Anatomy
from graftune.anatomy.modules import is_in
from graftune.errors import AdapterError
from graftune.sites import masks
from graftune.sites.base import Graft

GATES = ("auto", "mean", "mean-padded", "token")


class Gate(nn.Module):
    """G of one delta. Shapes: weight (1, d), bias (1); of two gates in one (2, d), (2)."""

    weight: nn.Parameter
    bias: nn.Parameter

    def __init__(self, kind: str, stack: str, width: int, options: Any, gates: int = 1) -> None:
        super().__init__()
        self.kind, self.stack = kind, stack
        self.weight = nn.Parameter(torch.empty(gates, width, **options))
        self.bias = nn.Parameter(torch.empty(gates, **options))

    def start(self) -> None:
        """Sets initial values."""
        nn.init.normal_(self.weight, std=0.02)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Returns G for x, `(rows, tokens, d)`: `(rows, tokens, gates)`; of a mean for 1 token.

        Raises:
            AdapterError: the model has put rows and tokens into one dimension, where a mean of each
                row can't be told; or its mask doesn't fit.
        """
        opened = torch.sigmoid(F.linear(x.to(self.weight.dtype), self.weight, self.bias))
        if self.kind == "token":
            return opened
        if x.ndim != 3:
            raise AdapterError(
                f'gate="{self.kind}" is a mean over each row\'s tokens, but this model runs the '
                f'place on tokens of all rows together, {tuple(x.shape)}: take "token".'
            )
        seen = masks.real(self.stack, x) if self.kind == "mean" else None
        if seen is None:
            return opened.mean(1, keepdim=True)
        weights = seen[..., None].to(opened.dtype)
        return (opened * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True).clamp(min=1)


def add_gates(kind: str, grafts: Iterable[Graft], anatomy: Anatomy, empty: bool) -> None:
    """Gives each delta that has a `gate_width` a gate, as its child `gate`.

    Args:
        kind: one of GATES.
        grafts: a method's.
        anatomy: where stacks and blocks are told from.
        empty: leave the gates uninitialised.
    """
    stacks = {block.path: stack.kind for stack in anatomy.stacks for block in stack.blocks}
    for graft in grafts:
        delta, module = graft.delta, graft.place.module
        inside = (stack for path, stack in stacks.items() if is_in(module, (path,)))
        stack = next(inside, "encoder")
        own = ("token" if stack == "decoder" else "mean") if kind == "auto" else kind
        first = next(delta.parameters())
        width: Any = delta.gate_width
        options = {"device": first.device, "dtype": first.dtype}
        gate = Gate(own, stack, width, options, getattr(delta, "gates_in_one", 1))
        if not empty:
            gate.start()
        delta.add_module("gate", gate)
        delta.needs_masks = own == "mean"
