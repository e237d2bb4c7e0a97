"""LoHa: dW = s * (B1 A1) o (B2 A2), an entry-by-entry product (Hyeon-Woo et al. 2022).

    x ──┬── W (frozen) ────────────────┐    B1, B2 (out, r)   A1, A2 (r, in)   s = alpha / r
        └── s * (B1 A1) o (B2 A2) ─────┴─ y   A2: zeros; the others Kaiming-uniform

Two matrices of rank r multiply to one of rank up to r². Identity at init: yes, bit for bit. Merge:
W + dW. Count: 2 r (out + in) per matrix. A convolution is the matrix (out, in * taps), or, with
`tucker`, B A becomes the core T (r, r, *kernel) between B (out, r) and A (r, in).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftune.errors import SettingsError
from graftune.methods._lycoris import Dropped, Lycoris, uniform
from graftune.methods._weight_change import ExpertsChange, LinearChange, Matrix
from graftune.methods.base import register
from graftune.sites import hosts
from graftune.sites.base import Delta


class HadamardProduct(torch.autograd.Function):
    """(B1 A1) o (B2 A2), of which the backward pass keeps the factors alone and multiplies again.

    Autograd would keep both products, two matrices as large as W, for each change.
    """

    @staticmethod
    def forward(ctx: Any, B1: Tensor, A1: Tensor, B2: Tensor, A2: Tensor) -> Tensor:
        """Returns the product, `(..., out, in)`."""
        ctx.save_for_backward(B1, A1, B2, A2)
        return (B1 @ A1) * (B2 @ A2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns the gradients of the factors."""
        B1, A1, B2, A2 = ctx.saved_tensors
        first, second = grads[0] * (B2 @ A2), grads[0] * (B1 @ A1)
        return first @ A1.mT, B1.mT @ first, second @ A2.mT, B2.mT @ second


class Hadamard(Dropped):
    """dW = s * (B1 A1) o (B2 A2).

    Shapes: B1, B2 (out, r); A1, A2 (r, in) or (r, in * taps); T1, T2 (r, r, *kernel) or absent, of
    which the first dimension meets B, the second A (r, in). Of experts (experts, ...) each.
    """

    B1: nn.Parameter
    A1: nn.Parameter
    B2: nn.Parameter
    A2: nn.Parameter
    T1: nn.Parameter | None
    T2: nn.Parameter | None

    def __init__(self, B: tuple[Tensor, Tensor], A: tuple[Tensor, Tensor], scale: float) -> None:
        super().__init__()
        (self.B1, self.B2), (self.A1, self.A2) = map(nn.Parameter, B), map(nn.Parameter, A)
        self.register_parameter("T1", None)
        self.register_parameter("T2", None)
        self.scale = scale

    def weight_change(self) -> Tensor:
        """Returns dW, `(..., out, in)`, of a convolution `(out, in * taps)`."""
        if self.T1 is not None and self.T2 is not None:
            left = _with_core(self.scale * self.B1, self.T1, self.A1)
            return left * _with_core(self.B2, self.T2, self.A2)
        factors = (self.scale * self.B1, self.A1, self.B2, self.A2)
        return HadamardProduct.apply(*factors)  # type: ignore[no-any-return]


class HadamardBeside(Hadamard, LinearChange):
    """LoHa beside a linear, Conv1D or convolution."""


class HadamardEmbedding(Hadamard, LinearChange):
    """LoHa beside an embedding: only the columns of the ids at hand are multiplied."""

    def forward(self, x: Tensor, y: Tensor, host: nn.Module) -> Tensor:
        """See `LinearDelta.forward`."""
        left = F.embedding(x, self.A1.t()) @ (self.scale * self.B1).t()  # (..., dim)
        change = left * (F.embedding(x, self.A2.t()) @ self.B2.t())
        if self.drops:
            change = change * self.kept(self.B1.shape[:1], change)
        return y + (change * hosts.embedding_scale(host)).to(y.dtype)


class HadamardInExperts(Hadamard, ExpertsChange):
    """LoHa on each expert of a 3-D tensor."""


@register
@dataclass(frozen=True, kw_only=True)
class LoHa(Lycoris):
    """Changes weights by the entry-by-entry product of two low-rank matrices."""

    name: ClassVar[str] = "LoHa"
    paper: ClassVar[str] = (
        "Hyeon-Woo et al. 2022, FedPara: Low-Rank Hadamard Product for Communication-Efficient "
        "Federated Learning"
    )
    summary: ClassVar[str] = "An entry-by-entry product of two low-rank matrices; merges."
    default_lr: ClassVar[float] = 5e-4

    def size(self, matrix: Matrix) -> int:
        """See `Lycoris.size`: 2 r (out + in), or 2 (r (out + in) + r² taps) with a core."""
        r = self.rank_of(matrix.name)
        if self.has_core(matrix):
            return 2 * (r * (matrix.out + matrix.fan_in // matrix.taps) + r * r * matrix.taps)
        return 2 * r * (matrix.out + matrix.fan_in)

    def change(self, matrix: Matrix, empty: bool) -> Delta:
        """See `Lycoris.change`."""
        r, out, fan_in = self.rank_of(matrix.name), matrix.out, matrix.fan_in
        most = min(out, fan_in)
        if not empty and r > most:
            raise SettingsError(
                f"LoHa: r is {r}, but {matrix.name} is {out}x{fan_in}, of which factors of rank "
                f"{most} are whole already; set a smaller r, or one for it in rank_pattern."
            )
        width = fan_in // matrix.taps if self.has_core(matrix) else fan_in
        B = (matrix.empty(out, r), matrix.empty(out, r))
        A = (matrix.empty(r, width), matrix.empty(r, width))
        delta = _kind(matrix)(B, A, self.scale(matrix.name))
        delta.rank = min(r * r, most)
        delta.rank_dropout, delta.module_dropout = self.rank_dropout, self.module_dropout
        if self.has_core(matrix):
            delta.T1 = nn.Parameter(matrix.empty(r, r, *matrix.kernel))
            delta.T2 = nn.Parameter(matrix.empty(r, r, *matrix.kernel))
        if not empty:
            _start(delta, matrix)
        return delta.at(matrix) if isinstance(delta, HadamardInExperts) else delta


def _kind(matrix: Matrix) -> type[HadamardBeside | HadamardEmbedding | HadamardInExperts]:
    if matrix.in_experts:
        return HadamardInExperts
    return HadamardEmbedding if hosts.kind_of(matrix.host) == "embedding" else HadamardBeside


@torch.no_grad()
def _start(delta: Hadamard, matrix: Matrix) -> None:
    """Draws all factors but A2, by how many numbers each sums up; an id picks one column of A."""
    r, picks = delta.B1.shape[-1], hosts.kind_of(matrix.host) == "embedding"
    uniform(delta.B1, r)
    uniform(delta.A1, 1 if picks else delta.A1.shape[-1])
    uniform(delta.B2, r)
    nn.init.zeros_(delta.A2)
    for core in (delta.T1, delta.T2):
        if core is not None:
            uniform(core, r * matrix.taps)


def _with_core(B: Tensor, T: Tensor, A: Tensor) -> Tensor:
    """Returns the kernel that T is in the bases B and A, as `(out, in * taps)`."""
    return torch.einsum("oi,ijk,jc->ock", B, T.flatten(2), A).flatten(1)
