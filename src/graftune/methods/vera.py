"""VeRA: y = W x + b * B (d * A x) with A and B random, frozen and shared (Kopiczko et al. 2024).

    x ──┬── W (frozen) ──────────────────┐    A (r, widest in), B (widest out, r): one pair for all
        └─ dropout ─ A ─ *d ─ B ─ *b ────┴─ y     matrices, each takes the corner of its own size

Only d (r), 0.1 at first, and b (out), zeros at first, are trained. Identity at init: yes, bit for
bit. Merge: W + diag(b) B diag(d) A. Count: r + out per matrix. arXiv 2310.11454, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftune.anatomy import Anatomy
from graftune.errors import SettingsError
from graftune.methods._weight_change import (
    ExpertsChange,
    LinearChange,
    Matrix,
    applied,
    targeted,
)
from graftune.methods.base import Method, register
from graftune.sites import hosts
from graftune.sites.base import Delta, Graft


class Projections(nn.Module):
    """A and B, that all deltas of an adapter share.

    Shapes: vera_A (r, widest in), vera_B (widest out, r); float32 or wider.
    """

    vera_A: Tensor
    vera_B: Tensor

    def __init__(self, A: Tensor, B: Tensor, saved: bool) -> None:
        super().__init__()
        self.register_buffer("vera_A", A, persistent=saved)
        self.register_buffer("vera_B", B, persistent=saved)


class Scaled(Delta):
    """dW = diag(b) B[:out] diag(d) A[:, :in].

    Shapes: b (out), d (r); of experts (experts, out) and (experts, r).
    """

    b: nn.Parameter
    d: nn.Parameter
    common: Projections

    def __init__(self, matrix: Matrix, r: int, common: Projections, dropout: float) -> None:
        super().__init__()
        self.b, self.d = nn.Parameter(matrix.empty(matrix.out)), nn.Parameter(matrix.empty(r))
        self.common, self.dropout, self.fan_in = common, dropout, matrix.fan_in
        self.rank = min(r, matrix.out, matrix.fan_in)

    def corners(self) -> tuple[Tensor, Tensor]:
        """Returns what this matrix takes of A, `(r, in)`, and of B, `(out, r)`."""
        A, B = self.common.vera_A, self.common.vera_B
        device, out = self.b.device, self.b.shape[-1]
        return A[:, : self.fan_in].to(device), B[:out].to(device)

    def weight_change(self) -> Tensor:
        """Returns dW, `(..., out, in)`, of a convolution `(out, in * taps)`."""
        A, B = self.corners()
        return self.b[..., :, None] * (B @ (self.d[..., :, None] * A))


class ScaledBeside(Scaled, LinearChange):
    """VeRA beside a linear, Conv1D, embedding or convolution."""

    def forward(self, x: Tensor, y: Tensor, host: nn.Module) -> Tensor:
        """See `LinearDelta.forward`."""
        kind, (A, B) = hosts.kind_of(host), self.corners()
        if self.dropout and self.training and kind != "embedding":
            x = F.dropout(x, self.dropout)
        down = applied(A, x, host)  # (..., r), of a convolution (batch, r, ...)
        down = down.movedim(1, -1) if kind == "conv" else down
        change = self.b * F.linear(self.d * down, B)
        change = change.movedim(-1, 1) if kind == "conv" else change
        return y + change.to(y.dtype)


class ScaledInExperts(Scaled, ExpertsChange):
    """VeRA on each expert of a 3-D tensor."""


@register
@dataclass(frozen=True, kw_only=True)
class VeRA(Method):
    """Trains two vectors per matrix, around random matrices that all of them share.

    On 3-D expert tensors the change is of the weight itself, so `dropout` is refused there.
    """

    name: ClassVar[str] = "VeRA"
    paper: ClassVar[str] = "Kopiczko et al. 2024, VeRA: Vector-based Random Matrix Adaptation"
    summary: ClassVar[str] = "Two trained vectors around random matrices shared by all; merges."
    default_lr: ClassVar[float] = 4e-3

    r: int = 256
    """Rows of the random A, columns of the random B."""
    d_initial: float = 0.1
    """What each d starts as; b starts at zero."""
    dropout: float = 0.0
    """Chance that an input feature of the change is dropped in training."""
    targets: str | tuple[str, ...] = "blocks"
    """Roles, module names or one regular expression; "blocks": all linears of attention and FFN."""
    exclude: tuple[str, ...] = ()
    """Module names left out of the targets."""
    layers: int | str | tuple[int, ...] | None = None
    """Blocks to change: an index, a list, or a slice such as "6:"; None for all."""
    projection_seed: int = 0
    """What A and B are drawn from, on the CPU, alike on every machine."""
    save_projection: bool = True
    """Store A and B in the file too; else they are drawn again from the seed."""

    def check(self) -> None:
        """See `Method.check`."""
        self._check_number("r", 1)
        if not math.isfinite(self.d_initial) or self.d_initial == 0:
            raise SettingsError(
                f"VeRA: d_initial is {self.d_initial}, expected a finite number other than 0: with "
                "b and d both at zero neither gets a gradient."
            )
        self._check_number("dropout", 0, 1, open_high=True)
        self._check_number("projection_seed", 0, 2**63 - 1)

    def plan(self, model: nn.Module, anatomy: Anatomy, *, empty: bool = False) -> list[Graft]:
        """See `Method.plan`."""
        matrices = targeted(model, anatomy, self.targets, self.layers, self.exclude)
        if self.dropout:
            _refuse_experts(matrices)
        common = self.projections(matrices, empty=empty)
        return [Graft(matrix.place, self._delta(matrix, common, empty)) for matrix in matrices]

    def count(self, model: nn.Module, anatomy: Anatomy) -> int:
        """See `Method.count`: r + out per matrix, of which an expert has its own."""
        matrices = targeted(model, anatomy, self.targets, self.layers, self.exclude)
        return sum(math.prod(matrix.lead) * (self.r + matrix.out) for matrix in matrices)

    def projections(self, matrices: Sequence[Matrix], *, empty: bool = False) -> Projections:
        """Returns A and B, wide enough for all matrices; drawn unless a file will fill them."""
        fan_in, out = max(m.fan_in for m in matrices), max(m.out for m in matrices)
        options = matrices[0].options
        if options["device"].type == "meta" or (empty and self.save_projection):
            A, B = torch.empty(self.r, fan_in, **options), torch.empty(out, self.r, **options)
        else:
            A, B = draw(self.r, fan_in, out, self.projection_seed)
        return Projections(A.to(**options), B.to(**options), self.save_projection)

    def _delta(self, matrix: Matrix, common: Projections, empty: bool) -> Delta:
        kind = ScaledInExperts if matrix.in_experts else ScaledBeside
        delta = kind(matrix, self.r, common, self.dropout)
        if not empty:
            nn.init.zeros_(delta.b)
            nn.init.constant_(delta.d, self.d_initial)
        return delta.at(matrix) if isinstance(delta, ScaledInExperts) else delta


def draw(r: int, fan_in: int, out: int, seed: int) -> tuple[Tensor, Tensor]:
    """Returns A (r, in) and B (out, r), Kaiming-uniform for ReLU, as HF PEFT draws them.

    In float32 by torch's CPU generator, A first, so that a seed means the same numbers everywhere.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    drawn: list[Tensor] = []
    for shape in ((r, fan_in), (out, r)):
        bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(shape[1]))
        tensor = torch.empty(shape, dtype=torch.float32, device="cpu")
        drawn.append(tensor.uniform_(-bound, bound, generator=generator))
    return drawn[0], drawn[1]


def _refuse_experts(matrices: Sequence[Matrix]) -> None:
    for matrix in matrices:
        if matrix.in_experts:
            raise SettingsError(
                f"VeRA: {matrix.name} holds the weights of experts, on which dropout is not "
                'possible; leave it out with targets="attention", or set dropout=0.'
            )
