"""The leading principal directions of vectors that come in batches, in memory for a few of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

EXACT = 256
"""Matrices with a side up to this one are decomposed exactly."""


class Spectrum:
    """Principal directions of all vectors so far: an incremental SVD about their mean.

    A batch X of n vectors joins the m before it by one SVD of

        [ S V ; X - mean(X) ; sqrt(n m / (n + m)) (mean(X) - mean before) ]

    of which the first k rows are kept (Ross et al. 2008, Incremental Learning for Robust Visual
    Tracking, section 3). Shapes: directions (k, in), strengths (k,) singular values, mean (in,).

    Args:
        size: k, the number of directions kept.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.count = 0
        self.directions = self.strengths = self.mean = torch.empty(0)
        self.scatter = torch.tensor(0.0)
        self.likeness = torch.empty(0)
        """Absolute cosine of each direction with what it was before the last batch."""

    def add(self, vectors: Tensor) -> None:
        """Takes in a batch of vectors, `(n, in)`."""
        new, before = len(vectors), self.count
        if not new:
            return
        vectors = vectors.float()
        mean = vectors.mean(0)
        rows = [vectors - mean]
        self.scatter = self.scatter + rows[0].square().sum()
        if before:
            step = (mean - self.mean) * math.sqrt(new * before / (new + before))
            self.scatter = self.scatter + step.square().sum()
            rows = [self.strengths[:, None] * self.directions, *rows, step[None]]
            mean = self.mean + (mean - self.mean) * (new / (new + before))
        old = self.directions
        self.strengths, self.directions = leading(torch.cat(rows), self.size)
        self.mean, self.count = mean, before + new
        if before:
            same = min(len(old), len(self.directions))
            self.likeness = (old[:same] * self.directions[:same]).sum(1).abs()

    def has_settled(self, rank: int, likeness: float) -> bool:
        """Whether the last batch turned none of the first `rank` directions by much."""
        alike = self.likeness[:rank]
        return len(alike) == rank and bool((alike >= likeness).all())

    def explained(self) -> list[float]:
        """Returns the share of the vectors' variance along each direction.

        Vectors that differ by no more than rounding don't vary.
        """
        rounding = 1e-12 * self.count * self.mean.square().sum()
        shares = self.strengths.square() / self.scatter
        return torch.where(self.scatter > rounding, shares, 0.0).tolist()


def leading(matrix: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Returns the largest `size` singular values of a matrix and their right-singular vectors.

    Large matrices are first brought down to 2 * size directions by four subspace iterations
    (Halko et al. 2011, arXiv 0909.4061, algorithm 4.4), always from the same random numbers.
    """
    narrow = 2 * size
    if min(matrix.shape) <= max(EXACT, narrow):
        _, strengths, directions = torch.linalg.svd(matrix, full_matrices=False)
        return strengths[:size], directions[:size]
    draw = torch.Generator(matrix.device).manual_seed(0)
    base = torch.randn(matrix.shape[1], narrow, generator=draw, device=matrix.device)
    for _ in range(4):
        image = torch.linalg.qr(matrix @ base)[0]
        base = torch.linalg.qr(matrix.t() @ image)[0]
    _, strengths, directions = torch.linalg.svd(matrix @ base, full_matrices=False)
    return strengths[:size], directions[:size] @ base.t()
