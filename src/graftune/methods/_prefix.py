"""Trained keys and values before those of each attention, direct or made by an MLP.

    direct      P_k (m, kv), P_v (m, kv)           of each attention
    MLP         [P_k ; P_v] of all layers = W2 tanh(W1 E + c1) + c2;   E (m, d) the same for all

The MLP is a way of training: once it is over, P alone is kept.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftune.methods._gate import Gate
from graftune.sites.base import AttentionDelta


class Gateable(AttentionDelta):
    """A prefix that may have a gate, or one for keys and one for values; see `Gate`."""

    gate_width: int
    """Features of what the attention is given."""
    gates_in_one: int = 1

    def gates(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """See `AttentionDelta.gates`."""
        found = cast(Gate, self.gate)(hidden)
        return found[..., :1], found[..., -1:]


class PrefixValues(Gateable):
    """P_k and P_v themselves. Shapes: key (m, kv), value (m, kv)."""

    key: nn.Parameter
    value: nn.Parameter

    def __init__(self, key: Tensor, value: Tensor, dropout: float = 0.0) -> None:
        super().__init__()
        self.key, self.value, self.p = nn.Parameter(key), nn.Parameter(value), dropout

    def prefix(self, heads: int) -> tuple[Tensor, Tensor] | None:
        """See `AttentionDelta.prefix`."""
        if not self.p or not self.training:
            return self.key, self.value
        return F.dropout(self.key, self.p), F.dropout(self.value, self.p)


class Mlp(nn.Module):
    """What makes the prefixes of one group of attentions.

    Shapes: E (m, d), W1 (hidden, d), c1 (hidden), W2 (sum of widths, hidden), c2 (sum of widths).
    """

    E: nn.Parameter
    W1: nn.Parameter
    c1: nn.Parameter
    W2: nn.Parameter
    c2: nn.Parameter

    def __init__(self, length: int, width: int, hidden: int, out: int, options: Any) -> None:
        super().__init__()
        shapes = {
            "E": (length, width),
            "W1": (hidden, width),
            "c1": (hidden,),
            "W2": (out, hidden),
            "c2": (out,),
        }
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, **options)))

    def start(self) -> None:
        """Sets initial values: E ~ N(0, 1), the maps as linears start."""
        nn.init.normal_(self.E)
        for weight, bias in ((self.W1, self.c1), (self.W2, self.c2)):
            bound = weight.shape[1] ** -0.5
            nn.init.uniform_(weight, -bound, bound)
            nn.init.uniform_(bias, -bound, bound)

    def rows(self, start: int, stop: int) -> Tensor:
        """Returns some of what it makes, `(m, stop - start)`."""
        inner = torch.tanh(F.linear(self.E, self.W1, self.c1))
        return F.linear(inner, self.W2[start:stop], self.c2[start:stop])


class PrefixFromMlp(Gateable):
    """A prefix that an MLP makes, which all attentions of a group share."""

    common: nn.Module

    def __init__(
        self, common: nn.Module, group: str, at: int, widths: tuple[int, int], dropout: float
    ) -> None:
        super().__init__()
        self.common, self.group, self.at, self.widths, self.p = common, group, at, widths, dropout

    def prefix(self, heads: int) -> tuple[Tensor, Tensor] | None:
        """See `AttentionDelta.prefix`."""
        made = self._made()
        if self.p and self.training:
            made = F.dropout(made, self.p)
        key, value = made.split(self.widths, dim=-1)
        return key, value

    def _made(self) -> Tensor:
        mlp = cast(Mlp, self.common.get_submodule(self.group))
        return mlp.rows(self.at, self.at + sum(self.widths))

    @torch.no_grad()
    def values(self) -> PrefixValues:
        """Returns the prefix itself, without the MLP."""
        key, value = self._made().split(self.widths, dim=-1)
        made = PrefixValues(key.clone(), value.clone(), self.p)
        made.shifts_keys, made.is_infix = self.shifts_keys, self.is_infix
        if self.reads_input:
            made.add_module("gate", self._modules["gate"])
            made.reads_input, made.needs_masks = True, self.needs_masks
        return made
