"""Fastfood: a random matrix M (D, d), applied in O(D log D) (Le et al. 2013, arXiv 1408.3060).

    M x = H G P H B x / sqrt(D * sum G^2), cut to D        N = 2^ceil(log2 max(D, d))
    H (N, N) Walsh-Hadamard, B random signs, P a random permutation, G Gaussian, x padded to N

E ||M x||^2 = ||x||^2. As x is zero after its first d entries, H B x is the transform of
2^ceil(log2 d) entries repeated, so only the second transform has N, and of that only D entries are
computed. H is symmetric, so that the backward pass is

    M^T g = B H P^T G H g / sqrt(D * sum G^2), cut to d
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_BITS = 5
"""Log2 of the largest Hadamard matrix that is multiplied with."""


def hadamard(x: Tensor, size: int | None = None, keep: int | None = None) -> Tensor:
    """Returns the first `keep` entries of H x; un-normalised, so that H H x = n x.

    H (n, n) is the Kronecker product of a small matrix for the highest bits of the index and one
    for the rest: what is zero in x or not kept costs nothing in the first of them.

    Args:
        x: `(k,)`, k <= n; zeros follow it.
        size: n, a power of two; x's own size unless given.
        keep: n unless given.
    """
    size = size or x.numel()
    keep = keep or size
    bits = size.bit_length() - 1
    lead = min(_BITS, bits)
    inner = size >> lead
    rows, kept = math.ceil(x.numel() / inner), math.ceil(keep / inner)
    matrix = _matrix(lead)[:kept, :rows].to(device=x.device, dtype=x.dtype)
    x = F.pad(x, (0, rows * inner - x.numel())).view(rows, inner)
    if kept < rows:
        return _in_rows(matrix @ x, bits - lead).reshape(-1)[:keep]
    return (matrix @ _in_rows(x, bits - lead)).reshape(-1)[:keep]


def _in_rows(x: Tensor, bits: int) -> Tensor:
    """Returns each row's transform, `(rows, 2^bits)`, by matrices of about equal sizes."""
    shape, stride, passes = x.shape, 1, math.ceil(bits / _BITS)
    for left in range(passes, 0, -1):
        step = math.ceil(bits / left)
        matrix = _matrix(step).to(device=x.device, dtype=x.dtype)
        if stride == 1:
            x = x.reshape(-1, 1 << step) @ matrix
        else:
            x = torch.matmul(matrix, x.reshape(-1, 1 << step, stride))
        stride, bits = stride << step, bits - step
    return x.reshape(shape)


@cache
def _matrix(bits: int) -> Tensor:
    """Returns the Hadamard matrix of 2^bits rows, built by doubling."""
    found = torch.ones(1, 1, device="cpu", dtype=torch.float32)
    for _ in range(bits):
        found = torch.cat([torch.cat([found, found], 1), torch.cat([found, -found], 1)])
    return found


class Fastfood(nn.Module):
    """One fixed random projection from d to `size` numbers, drawn on the CPU from a seed.

    Buffers, none of them kept in files: signs (2^k,) of +-1, 2^k >= d; source (N,) int32, where
    each permuted entry comes from; bits (N,) int32, those of `gauss`, so that a model cast to 16
    bits keeps its projection.

    Args:
        d: width of what is projected.
        size: D, the width of the projection.
        seed: the same seed gives the same projection on every device.
        device: where the buffers go.
    """

    signs: Tensor
    source: Tensor
    bits: Tensor

    def __init__(self, d: int, size: int, seed: int, device: torch.device) -> None:
        super().__init__()
        self.d, self.size = d, size
        draw = torch.Generator().manual_seed(seed)
        low = 1 << math.ceil(math.log2(d)) if d > 1 else 1
        high = max(low, 1 << math.ceil(math.log2(size)) if size > 1 else 1)
        wide: dict[str, Any] = {"generator": draw, "device": "cpu", "dtype": torch.float32}
        signs = torch.randint(0, 2, (low,), **wide) * 2 - 1
        source = torch.randperm(high, generator=draw, device="cpu").remainder_(low).to(torch.int32)
        gauss = torch.randn(high, **wide)
        self.scale = 1 / math.sqrt(size * float(gauss.double().square().sum()))
        self.register_buffer("signs", signs.to(device), persistent=False)
        self.register_buffer("source", source.to(device), persistent=False)
        self.register_buffer("bits", gauss.view(torch.int32).to(device), persistent=False)

    @property
    def gauss(self) -> Tensor:
        """G's diagonal, `(N,)`, float32."""
        return self.bits.view(torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        """Returns M x, `(size,)`, for x `(d,)`."""
        return _Apply.apply(x, self)

    def project(self, x: Tensor) -> Tensor:
        """Returns M x without a graph, in float32 or wider whatever autocast says."""
        with torch.autocast(x.device.type, enabled=False):
            low = _wide(x) * self.signs[: self.d] * self.scale
            low = hadamard(low, self.signs.numel())
            high = low.index_select(0, self.source).mul_(self.gauss)
            return hadamard(high, keep=self.size)

    def fold(self, g: Tensor) -> Tensor:
        """Returns M^T g, `(d,)`, for g `(size,)`; as `project` does."""
        with torch.autocast(g.device.type, enabled=False):
            high = hadamard(_wide(g), self.bits.numel()).mul_(self.gauss)
            low = high.new_zeros(self.signs.numel()).index_add_(0, self.source, high)
            return hadamard(low, keep=self.d) * self.signs[: self.d] * self.scale


def _wide(x: Tensor) -> Tensor:
    """Returns x in float32 or wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _Apply(torch.autograd.Function):
    """M x, with M^T in the backward pass; nothing of the forward is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, projection: Fastfood) -> Tensor:
        ctx.projection = projection
        return projection.project(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return ctx.projection.fold(gradients[0]), None
