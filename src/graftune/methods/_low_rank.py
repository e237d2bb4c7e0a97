"""The low-rank change dW = s * B A on every kind of host, and DoRA's magnitude on top of it.

    x ──┬── W (frozen) ──────────┐
        └─ dropout ─ A ─ B ─ *s ─┴─ y        A: (r, in)   B: (out, r)

Letters as in Hu et al. 2021 (arXiv 2106.09685) and Liu et al. 2024 (DoRA, arXiv 2402.09353).
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftune.errors import AdapterError
from graftune.methods._gate import Gate
from graftune.methods._weight_change import ExpertsChange
from graftune.sites import hosts
from graftune.sites.base import LinearDelta


class LowRank(LinearDelta):
    """y + s * B A x, on a linear or Conv1D.

    Shapes: A (r, in), B (out, r), bias (out) or absent; A0 and B0 as A and B, where the change is
    counted from a start that isn't zero (PiSSA, OLoRA): y + s * (B A - B0 A0) x.
    """

    A: nn.Parameter
    B: nn.Parameter
    bias: nn.Parameter | None
    A0: Tensor | None
    B0: Tensor | None

    def __init__(self, A: Tensor, B: Tensor, scale: float, dropout: float, bias: bool) -> None:
        super().__init__()
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)
        self.register_parameter("bias", nn.Parameter(B.new_zeros(B.shape[0])) if bias else None)
        self.register_buffer("A0", None)
        self.register_buffer("B0", None)
        self.register_buffer("index", None, persistent=False)
        self.scale, self.dropout = scale, dropout
        self.rank = A.shape[0]

    def start_from_here(self) -> None:
        """Counts the change from the present A and B, so that it starts at exactly zero."""
        self.A0, self.B0 = self.A.detach().clone(), self.B.detach().clone()
        self.rank = 2 * self.A.shape[0]

    def forward(self, x: Tensor, y: Tensor, host: nn.Module) -> Tensor:
        """See `LinearDelta.forward`."""
        if self.dropout and self.training:
            x = self.dropped(x)
        change = self.change(x, host)
        if change.dtype is y.dtype:
            return torch.add(y, change, alpha=self.scale)
        return y + (change * self.scale).to(y.dtype)

    def dropped(self, x: Tensor) -> Tensor:
        """Returns the input with LoRA's dropout on it."""
        return F.dropout(x, self.dropout)

    def change(self, x: Tensor, host: nn.Module) -> Tensor:
        """Returns B A x, `(..., out)`, unscaled."""
        own, start = self._parameters, self._buffers  # not by attribute: a hot path
        A: Any = own["A"]
        if x.dtype is not A.dtype:
            x = x.to(A.dtype)
        change = F.linear(F.linear(x, A), cast(Tensor, own["B"]), own["bias"])
        A0, B0 = start["A0"], start["B0"]
        if A0 is not None and B0 is not None:
            change = change - F.linear(F.linear(x, A0), B0)
        return change

    def weight_change(self) -> Tensor:
        """Returns s * B A as `(out, in, ...)`."""
        change = self.B.flatten(1) @ self.A.flatten(1)
        if self.A0 is not None and self.B0 is not None:
            change = change - self.B0.flatten(1) @ self.A0.flatten(1)
        return self.scale * change.reshape(self.B.shape[0], *self.A.shape[1:])

    def merged(self, weight: Tensor, host: nn.Module) -> Tensor:
        """See `Delta.merged`: W + s * B A."""
        return weight + self.weight_change().to(weight.dtype)

    def bias_change(self, bias: Tensor | None) -> Tensor | None:
        """See `LinearDelta.bias_change`."""
        return None if self.bias is None else self.scale * self.bias


class GatedLowRank(LowRank):
    """y + G * s * B A x, G by row or token of x; it can't be merged. Shapes: gate, see `Gate`."""

    gate: Gate

    @property
    def gate_width(self) -> int:
        """Features that the gate reads."""
        return self.A.shape[1]

    def forward(self, x: Tensor, y: Tensor, host: nn.Module) -> Tensor:
        """See `LinearDelta.forward`."""
        dropped = self.dropped(x) if self.dropout and self.training else x
        return y + (self.change(dropped, host) * (self.gate(x) * self.scale)).to(y.dtype)

    def merged(self, weight: Tensor, host: nn.Module) -> Tensor:
        """See `Delta.merged`."""
        raise AdapterError("A gated LoRA can't be merged: its gates depend on the input.")


class LowRankEmbedding(LowRank):
    """E[ids] + s * B A[:, ids]. Shapes: A (r, vocabulary), B (dim, r)."""

    def change(self, x: Tensor, host: nn.Module) -> Tensor:
        """See `LowRank.change`."""
        change = F.embedding(x, self.A.t()) @ self.B.t()
        return change * hosts.embedding_scale(host)

    def dropped(self, x: Tensor) -> Tensor:
        """Returns the ids: dropout has nothing to fall on."""
        return x


class LowRankConv(LowRank):
    """conv(x) + s * B conv_A(x). Shapes: A (r, in, *kernel), B (out, r, 1, ...)."""

    def change(self, x: Tensor, host: nn.Module) -> Tensor:
        """See `LowRank.change`."""
        assert isinstance(host, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        conv = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[self.A.ndim]
        down = conv(x.to(self.A.dtype), self.A, None, host.stride, host.padding, host.dilation)
        return conv(down, self.B, self.bias)


class Magnitude(LowRank):
    """DoRA: the rows of V = W + s * B A, each brought to a trained length m.

        W' = m * V / ||V||,   y' = y + (m / ||V|| - 1) * (y - b) + m / ||V|| * s * B A x

    ||V|| is a constant in the backward pass (section 4.3). Shapes: m (out), else as LowRank.
    """

    m: nn.Parameter
    index: Tensor | None
    """The host's output features that this delta has, where not all."""

    def set_magnitude(self, weight: Tensor) -> None:
        """Sets m to the row norms of `weight`, `(out, in, ...)`: the start is the base."""
        self.m = nn.Parameter(self.norm(weight))

    def norm(self, weight: Tensor) -> Tensor:
        """Returns ||W + s * B A|| of each row, `(out,)`, without gradient."""
        with torch.no_grad():
            return (weight.to(self.B.dtype) + self.weight_change()).flatten(1).norm(dim=1)

    def forward(self, x: Tensor, y: Tensor, host: nn.Module) -> Tensor:
        """See `LinearDelta.forward`."""
        weight, bias = hosts.read(host), getattr(host, "bias", None)
        if self.index is not None:
            weight, bias = weight[self.index], None if bias is None else bias[self.index]
        factor = self.m / self.norm(weight)
        plain = y if bias is None else y - self.along(bias, y)
        if self.dropout and self.training and self.A.ndim == 2:
            dropped = self.dropped(x)
            plain = F.linear(dropped, weight) if dropped is not x else plain
            x = dropped
        factor = self.along(factor, y)
        change = self.change(x, host) * (factor * self.scale)
        return y + ((factor - 1) * plain + change).to(y.dtype)

    def along(self, values: Tensor, y: Tensor) -> Tensor:
        """Returns `(out,)` values shaped to the features of y."""
        return values

    def merged(self, weight: Tensor, host: nn.Module) -> Tensor:
        """See `Delta.merged`."""
        self.turned = self.m / self.norm(weight)
        factor = self.turned.reshape(-1, *[1] * (weight.ndim - 1))
        return (factor * (weight.to(self.B.dtype) + self.weight_change())).to(weight.dtype)

    turned: Tensor | float = 1.0
    """m / ||V||, `(out,)`, as the weight was merged: B's bias is turned by it too."""

    def bias_change(self, bias: Tensor | None) -> Tensor | None:
        """See `LinearDelta.bias_change`; asked for once the weight is merged."""
        change = super().bias_change(bias)
        return None if change is None else self.turned * change


class MagnitudeEmbedding(Magnitude, LowRankEmbedding):
    """DoRA on an embedding: a length for each dimension."""


class MagnitudeConv(Magnitude, LowRankConv):
    """DoRA on a convolution: a length for each output channel."""

    def along(self, values: Tensor, y: Tensor) -> Tensor:
        """See `Magnitude.along`."""
        return values.reshape(-1, *[1] * (y.ndim - 2))


class LowRankExperts(ExpertsChange):
    """theta_e + s * B_e A_e for each expert e of a 3-D parameter.

    Shapes: A (experts, r, in), B (experts, out, r).
    """

    A: nn.Parameter
    B: nn.Parameter

    def __init__(
        self, A: Tensor, B: Tensor, scale: float, index: Tensor | None, turned: bool
    ) -> None:
        super().__init__()
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)
        self.register_buffer("index", index, persistent=False)
        self.scale, self.turned = scale, turned
        self.rank = A.shape[1]

    def weight_change(self) -> Tensor:
        """Returns s * B A, `(experts, out, in)`."""
        return self.scale * torch.bmm(self.B, self.A)


class TokenRows(LinearDelta):
    """An embedding in which chosen tokens have rows of their own.

    Shapes: rows (tokens, dim); ids (tokens,) int64.
    """

    rows: nn.Parameter
    ids: Tensor

    def __init__(self, ids: Tensor, rows: Tensor) -> None:
        super().__init__()
        self.rows = nn.Parameter(rows)
        self.register_buffer("ids", ids, persistent=False)

    def forward(self, x: Tensor, y: Tensor, host: nn.Module) -> Tensor:
        """See `LinearDelta.forward`."""
        hit = x[..., None] == self.ids
        own = (self.rows * hosts.embedding_scale(host)).to(y.dtype)[hit.int().argmax(-1)]
        return torch.where(hit.any(-1, keepdim=True), own, y)

    def changes(self, size: int) -> int:
        """See `Delta.changes`: the rows alone."""
        return self.rows.numel()

    def merged(self, weight: Tensor, host: nn.Module) -> Tensor:
        """See `Delta.merged`; the weight is (dim, vocabulary)."""
        return weight.index_copy(1, self.ids, self.rows.t().to(weight.dtype))


class TokenTwin(LinearDelta):
    """An embedding tied to one with `TokenRows`: it has the same new rows."""

    def __init__(self, rows: TokenRows) -> None:
        super().__init__()
        self.source = (rows,)
        self.follows = True

    def forward(self, x: Tensor, y: Tensor, host: nn.Module) -> Tensor:
        """See `LinearDelta.forward`."""
        return self.source[0](x, y, host)


class TokenColumns(LinearDelta):
    """The output layer tied to an embedding with `TokenRows`: their logits follow the new rows."""

    def __init__(self, rows: TokenRows) -> None:
        super().__init__()
        self.source = (rows,)
        self.follows = True

    def forward(self, x: Tensor, y: Tensor, host: nn.Module) -> Tensor:
        """See `LinearDelta.forward`."""
        rows = self.source[0]
        logits = F.linear(x.to(rows.rows.dtype), rows.rows).to(y.dtype)
        bias = getattr(host, "bias", None)
        if bias is not None:
            logits = logits + bias[rows.ids]
        return y.index_copy(-1, rows.ids, logits)
