"""LoKr: dW = s * W1 (x) W2, a Kronecker product of two small matrices (Yeh et al. 2023, LyCORIS).

    out = a * c, in = b * e            W1 (a, b) or W1a (a, r) W1b (r, b)      s = alpha / r
    dW[i*c + k, j*e + l]               W2 (c, e) or W2a (c, r) W2b (r, e)
        = s * W1[i, j] * W2[k, l]      or, of a convolution with `tucker`, a core T2 (r, r, *kernel)

Identity at init: yes, bit for bit (W1 or W1a is zeros; "lycoris": W2 or W2b). Merge: W + dW. Count:
a b or r (a + b), and c e or r (c + e). A linear's dW x = s * W1 X W2', X (b, e) the entries of x,
is computed so, without dW, where that takes fewer multiplications.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftune.errors import SettingsError
from graftune.methods._lycoris import Dropped, Lycoris, uniform
from graftune.methods._weight_change import ExpertsChange, LinearChange, Matrix
from graftune.methods.base import register
from graftune.sites import hosts
from graftune.sites.base import Delta


def divisors(size: int, factor: int = -1) -> tuple[int, int]:
    """Returns m, n with m * n = size: m the largest divisor up to the root, and up to `factor`.

    A factor that divides the size is m itself, even above the root.

    >>> divisors(768), divisors(3072), divisors(4096), divisors(11008)
    ((24, 32), (48, 64), (64, 64), (86, 128))
    >>> divisors(768, factor=8), divisors(768, factor=7)
    ((8, 96), (6, 128))
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    most = min(math.isqrt(size), factor) if factor > 0 else math.isqrt(size)
    m = next(m for m in range(most, 0, -1) if size % m == 0)
    return m, size // m


@dataclass(frozen=True)
class Cut:
    """How a matrix is cut: out = a * c, in = b * e * taps, and which parts are of rank r."""

    a: int
    b: int
    c: int
    e: int
    taps: int
    first_low: bool
    second_low: bool
    core: bool

    def size(self, r: int) -> int:
        """Returns the number of parameters."""
        first = r * (self.a + self.b) if self.first_low else self.a * self.b
        if not self.second_low:
            return first + self.c * self.e * self.taps
        width = self.e if self.core else self.e * self.taps
        return first + r * (self.c + width) + (r * r * self.taps if self.core else 0)

    def rank(self, r: int) -> int:
        """Returns the largest rank of dW: that of W1 times that of W2."""
        first, second = min(self.a, self.b), min(self.c, self.e * self.taps)
        return (min(first, r) if self.first_low else first) * (
            min(second, r) if self.second_low else second
        )


class Kronecker(Dropped):
    """dW = s * W1 (x) W2.

    Shapes: W1 (a, b), or W1a (a, r) and W1b (r, b); W2 (c, e * taps), or W2a (c, r) and W2b
    (r, e * taps), or these with W2b (r, e) and T2 (r, r, *kernel). Of experts (experts, ...) each.
    """

    W1: nn.Parameter | None
    W1a: nn.Parameter | None
    W1b: nn.Parameter | None
    W2: nn.Parameter | None
    W2a: nn.Parameter | None
    W2b: nn.Parameter | None
    T2: nn.Parameter | None
    names: ClassVar[tuple[str, ...]] = ("W1", "W1a", "W1b", "W2", "W2a", "W2b", "T2")

    kernel: tuple[int, ...] = ()
    """Sizes of the convolution's kernel, where it is one."""

    def __init__(self, tensors: dict[str, Tensor], cut: Cut, scale: float) -> None:
        super().__init__()
        for name in self.names:
            tensor = tensors.get(name)
            self.register_parameter(name, None if tensor is None else nn.Parameter(tensor))
        self.cut, self.scale = cut, scale

    def first(self) -> Tensor:
        """Returns s * W1, `(..., a, b)`."""
        if self.W1 is not None:
            return self.scale * self.W1
        assert self.W1a is not None
        assert self.W1b is not None
        return (self.scale * self.W1a) @ self.W1b

    def second(self) -> Tensor:
        """Returns W2, `(..., c, e)`, of a convolution `(c, e * taps)`."""
        if self.W2 is not None:
            return self.W2
        assert self.W2a is not None
        assert self.W2b is not None
        if self.T2 is None:
            return self.W2a @ self.W2b
        return torch.einsum("ci,ijk,je->cek", self.W2a, self.T2.flatten(2), self.W2b).flatten(1)

    def weight_change(self) -> Tensor:
        """Returns dW, `(..., out, in)`, of a convolution `(out, in * taps)`."""
        product = self.first()[..., :, None, :, None] * self.second()[..., None, :, None, :]
        return product.flatten(-4, -3).flatten(-2)


class KroneckerBeside(Kronecker, LinearChange):
    """LoKr beside a linear, Conv1D or convolution."""

    def forward(self, x: Tensor, y: Tensor, host: nn.Module) -> Tensor:
        """See `LinearDelta.forward`."""
        cut = self.cut
        # By parts b c (e + a) multiplications a token, with dW a b c e.
        if hosts.kind_of(host) != "linear" or cut.e + cut.a >= cut.e * cut.a:
            return super().forward(x, y, host)
        second = self.second()
        X = x.to(second.dtype).unflatten(-1, (cut.b, cut.e))
        change = (self.first() @ F.linear(X, second)).flatten(-2)  # (..., a, b) (..., b, c)
        if self.drops:
            change = change * self.kept(change.shape[-1:], change)
        return y + change.to(y.dtype)


class KroneckerEmbedding(Kronecker, LinearChange):
    """LoKr beside an embedding: id j * e + l picks column j of W1 and column l of W2."""

    def forward(self, x: Tensor, y: Tensor, host: nn.Module) -> Tensor:
        """See `LinearDelta.forward`."""
        left = F.embedding(x // self.cut.e, self.first().t())  # (..., a)
        right = F.embedding(x % self.cut.e, self.second().t())  # (..., c)
        change = (left[..., :, None] * right[..., None, :]).flatten(-2)
        if self.drops:
            change = change * self.kept(change.shape[-1:], change)
        return y + (change * hosts.embedding_scale(host)).to(y.dtype)


class KroneckerInExperts(Kronecker, ExpertsChange):
    """LoKr on each expert of a 3-D tensor."""


@register
@dataclass(frozen=True, kw_only=True)
class LoKr(Lycoris):
    """Changes weights by the Kronecker product of two small matrices."""

    name: ClassVar[str] = "LoKr"
    paper: ClassVar[str] = (
        "Yeh et al. 2023, Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to "
        "Model Evaluation"
    )
    summary: ClassVar[str] = "A Kronecker product of two small matrices; merges."
    default_lr: ClassVar[float] = 1e-3

    decompose_both: bool = False
    """Give W1 a rank too, where r is below half its longer side; W2 always has one there."""
    decompose_factor: int = -1
    """Sides of W1: this where it divides a width, else the largest divisor below; -1: the root."""
    init: Literal["zero-W1", "lycoris"] = "zero-W1"
    """What starts as zeros: W1 (or W1a); or, as in LyCORIS, W2 (or W2b)."""
    scaling: Literal["peft", "lycoris"] = "peft"
    """The scale where neither W1 nor W2 has a rank: alpha / r as elsewhere, or LyCORIS's 1."""
    rank_dropout_scale: bool = False
    """Let the rows that `rank_dropout` keeps make up for the others."""

    def check(self) -> None:
        """See `Method.check`."""
        super().check()
        self._check_choice("init", ("zero-W1", "lycoris"))
        self._check_choice("scaling", ("peft", "lycoris"))
        if self.decompose_factor != -1 and self.decompose_factor < 1:
            raise SettingsError(
                f"LoKr: decompose_factor is {self.decompose_factor}, expected -1 (divisors nearest "
                "the square root) or at least 1."
            )

    def cut(self, matrix: Matrix) -> Cut:
        """Returns how a matrix is cut."""
        r = self.rank_of(matrix.name)
        a, c = divisors(matrix.out, self.decompose_factor)
        b, e = divisors(matrix.fan_in // matrix.taps, self.decompose_factor)
        first, second = self.decompose_both and r < max(a, b) / 2, r < max(c, e) / 2
        core = second and self.has_core(matrix)
        return Cut(a, b, c, e, matrix.taps, first, second, core)

    def scale_of(self, matrix: Matrix) -> float:
        """Returns s for a matrix."""
        cut = self.cut(matrix)
        whole = not (cut.first_low or cut.second_low)
        return 1.0 if whole and self.scaling == "lycoris" else self.scale(matrix.name)

    def size(self, matrix: Matrix) -> int:
        """See `Lycoris.size`."""
        return self.cut(matrix).size(self.rank_of(matrix.name))

    def change(self, matrix: Matrix, empty: bool) -> Delta:
        """See `Lycoris.change`."""
        cut, r = self.cut(matrix), self.rank_of(matrix.name)
        tensors = {name: matrix.empty(*shape) for name, shape in _shapes(cut, r, matrix).items()}
        delta = _kind(matrix)(tensors, cut, self.scale_of(matrix))
        delta.kernel, delta.rank, delta.rescaled = (
            matrix.kernel,
            cut.rank(r),
            self.rank_dropout_scale,
        )
        delta.rank_dropout, delta.module_dropout = self.rank_dropout, self.module_dropout
        if not empty:
            _start(delta, self.init, hosts.kind_of(matrix.host) == "embedding")
        return delta.at(matrix) if isinstance(delta, KroneckerInExperts) else delta


def _kind(matrix: Matrix) -> type[KroneckerBeside | KroneckerEmbedding | KroneckerInExperts]:
    if matrix.in_experts:
        return KroneckerInExperts
    return KroneckerEmbedding if hosts.kind_of(matrix.host) == "embedding" else KroneckerBeside


def _shapes(cut: Cut, r: int, matrix: Matrix) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    if cut.first_low:
        shapes |= {"W1a": (cut.a, r), "W1b": (r, cut.b)}
    else:
        shapes["W1"] = (cut.a, cut.b)
    if not cut.second_low:
        return shapes | {"W2": (cut.c, cut.e * cut.taps)}
    if not cut.core:
        return shapes | {"W2a": (cut.c, r), "W2b": (r, cut.e * cut.taps)}
    return shapes | {"W2a": (cut.c, r), "W2b": (r, cut.e), "T2": (r, r, *matrix.kernel)}


@torch.no_grad()
def _start(delta: Kronecker, init: str, picks: bool) -> None:
    """Draws the factors by how many numbers each sums up; an id picks one column of two."""
    zeros = ("W1", "W1a") if init == "zero-W1" else ("W2", "W2b")
    for name, tensor in delta.named_parameters():
        if name in zeros:
            nn.init.zeros_(tensor)
        elif name == "T2":
            uniform(tensor, tensor.shape[1:].numel())
        else:
            uniform(tensor, 1 if picks and name in ("W1", "W1b", "W2", "W2b") else tensor.shape[-1])
