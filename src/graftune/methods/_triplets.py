"""The change s * P Lambda Q on every kind of host, and which of its triplets matter.

A triplet i is P's column i, lambda_i and Q's row i. What is measured of a weight w at each step
(Zhang et al. 2023, arXiv 2303.10512, section 3.2), smoothed over the steps:

    I = |w * dL/dw|      sensitivity = beta1 * sensitivity + (1 - beta1) * I
                         uncertainty = beta2 * uncertainty + (1 - beta2) * |I - sensitivity|

Its importance is sensitivity * uncertainty; a triplet's is lambda's plus the means over its column
of P and its row of Q.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftune.methods._weight_change import ExpertsChange, LinearChange, applied
from graftune.sites import hosts
from graftune.sites.base import Delta

FACTORS = ("P", "Lambda", "Q")
_MEASURED = tuple(f"{what}_{name}" for name in FACTORS for what in ("sensitivity", "uncertainty"))


class Triplets(Delta):
    """P, Lambda and Q, with what pruning needs to know of them.

    Shapes: P (out, r), Lambda (r,), Q (r, in * taps); of experts each has (experts,) before it.
    While it prunes: is_kept as Lambda, bool, and a sensitivity and an uncertainty as each factor.
    """

    P: nn.Parameter
    Lambda: nn.Parameter
    Q: nn.Parameter
    is_kept: Tensor
    resumes: ClassVar[tuple[str, ...]] = (*_MEASURED, "is_kept")

    def __init__(
        self,
        P: Tensor,
        Lambda: Tensor,
        Q: Tensor,
        scale: float,
        prunes: bool,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.P, self.Lambda, self.Q = nn.Parameter(P), nn.Parameter(Lambda), nn.Parameter(Q)
        self.scale, self.dropout = scale, dropout
        self.rank = Lambda.shape[-1]
        for name in self.resumes:
            like = Lambda if name == "is_kept" else self.get_parameter(name.split("_")[1])
            self.register_buffer(name, torch.zeros_like(like) if prunes else None, persistent=False)
        if prunes:
            self.is_kept = torch.ones_like(Lambda, dtype=torch.bool)

    def changes(self, size: int) -> int:
        """See `Delta.changes`: nothing where no triplet is left."""
        return size if self.rank else 0

    def weight_change(self) -> Tensor:
        """Returns s * P Lambda Q, `(..., out, in * taps)`."""
        return self.scale * self.P @ (self.Lambda[..., None] * self.Q)

    def grams(self) -> tuple[Tensor, Tensor]:
        """Returns P' P and Q Q', `(matrices, r, r)` each: I where the triplets are orthonormal."""
        size = (-1, *2 * (self.Lambda.shape[-1],))
        return (self.P.mT @ self.P).reshape(size), (self.Q @ self.Q.mT).reshape(size)

    @torch.no_grad()
    def measure(self, beta1: float, beta2: float) -> None:
        """Takes the present weights and gradients into the smoothed importance."""
        for name in FACTORS:
            weight = self.get_parameter(name)
            sensitivity = self.get_buffer(f"sensitivity_{name}")
            uncertainty = self.get_buffer(f"uncertainty_{name}")
            gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
            now = (weight * gradient).abs()
            now.nan_to_num_(0.0, posinf=0.0)  # fp16: a step that was skipped, its scale too high
            sensitivity.lerp_(now, 1 - beta1)
            uncertainty.lerp_((now - sensitivity).abs(), 1 - beta2)

    def importance(self) -> Tensor:
        """Returns each triplet's importance, as Lambda."""
        P, Lambda, Q = (
            self.get_buffer(f"sensitivity_{name}") * self.get_buffer(f"uncertainty_{name}")
            for name in FACTORS
        )
        return Lambda + P.mean(-2) + Q.mean(-1)

    @torch.no_grad()
    def prune(self) -> None:
        """Sets the lambdas of the triplets that aren't kept to 0."""
        self.Lambda.masked_fill_(~self.is_kept, 0.0)

    @torch.no_grad()
    def shrink(self) -> None:
        """Drops the triplets that aren't kept, and what was measured.

        Of experts, each keeps as many as the one that has most; those too many have a lambda of 0.
        """
        self.prune()
        kept = self.is_kept
        self.rank = int(kept.sum(-1).max())
        order = kept.int().argsort(dim=-1, descending=True, stable=True)[..., : self.rank]
        chosen = {
            "P": self.P.take_along_dim(order[..., None, :], -1),
            "Lambda": self.Lambda.take_along_dim(order, -1),
            "Q": self.Q.take_along_dim(order[..., None], -2),
        }
        for name, tensor in chosen.items():
            trains = self.get_parameter(name).requires_grad
            setattr(self, name, nn.Parameter(tensor.contiguous(), requires_grad=trains))
        for name in self.resumes:
            setattr(self, name, None)

    def mean_rank(self) -> float:
        """Returns the triplets left of a matrix: of experts' the mean, those of lambda 0 left out.

        Until it is pruned for good, those that were kept last.
        """
        matrices = max(1, self.Lambda.numel() // max(1, self.Lambda.shape[-1]))
        kept = self._buffers["is_kept"]
        return int((self.Lambda != 0 if kept is None else kept).sum()) / matrices


class TripletsBeside(Triplets, LinearChange):
    """y + s * P Lambda Q x on a linear, Conv1D, embedding or convolution, factor by factor."""

    def forward(self, x: Tensor, y: Tensor, host: nn.Module) -> Tensor:
        """See `LinearDelta.forward`."""
        if self.rank == 0:
            return y
        if self.dropout and self.training and x.is_floating_point():
            x = F.dropout(x, self.dropout)
        P, Lambda, Q = (cast(Tensor, self._parameters[name]) for name in FACTORS)
        inner = applied(Lambda[:, None] * Q, x, host)  # (..., r), of a convolution (batch, r, ...)
        if hosts.kind_of(host) == "conv":
            change = torch.einsum("br...,or->bo...", inner, P)
        else:
            change = F.linear(inner, P)
        if change.dtype is y.dtype:
            return torch.add(y, change, alpha=self.scale)
        return y + (change * self.scale).to(y.dtype)


class TripletsInExperts(Triplets, ExpertsChange):
    """theta_e + s * P_e Lambda_e Q_e for each expert e of a 3-D parameter."""


def allocate(found: Sequence[Triplets], budget: int) -> None:
    """Keeps the `budget` most important triplets of all matrices, of equal ones the first; prunes.

    Source: section 3.3; the authors' code prunes all that tie with the last one kept, we don't.
    """
    importance = torch.cat([one.importance().flatten().to(found[0].Lambda.device) for one in found])
    is_kept = torch.zeros_like(importance, dtype=torch.bool)
    is_kept[importance.argsort(descending=True, stable=True)[:budget]] = True
    for one, mask in zip(found, is_kept.split([one.Lambda.numel() for one in found]), strict=True):
        one.is_kept.copy_(mask.view_as(one.is_kept))
        one.prune()
