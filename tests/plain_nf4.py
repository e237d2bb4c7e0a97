"""NF4 with double quantisation written plainly, as Dettmers et al. 2023 (arXiv 2305.14314) say it.

Blocks of 64 weights have one scale, their largest magnitude; a weight is the nearest of 16 values
times it. Scales less their mean are kept in 8 bits, 256 to a block, in the same way.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK, SCALES_BLOCK = 64, 256


def quantiles() -> Tensor:
    """Returns the 16 values: quantiles of N(0, 1), eight above zero, seven below, over the last."""

    def half(count: int) -> Tensor:
        shares = torch.linspace(0.9677083, 0.5, count + 1, dtype=torch.float64)[:-1]
        return torch.special.ndtri(shares)

    values = torch.cat([half(8), -half(7), torch.zeros(1, dtype=torch.float64)]).sort().values
    return (values / values.max()).float()


def eight_bits() -> Tensor:
    """Returns 256 values: a sign, a decimal exponent and as many digits as there is room for."""
    positive = torch.cat(
        [
            10.0 ** (i - 6) * (edges[:-1] + edges[1:]) / 2
            for i in range(7)
            for edges in [torch.linspace(0.1, 1, 2**i + 1)]
        ]
    )
    return torch.cat([-positive, torch.tensor([0.0, 1.0]), positive]).sort().values


@dataclass(frozen=True)
class Quantised:
    """Codes, one of 16 each, and what their scales are."""

    codes: Tensor
    scale_codes: Tensor
    second: Tensor
    mean: Tensor

    @property
    def scales(self) -> Tensor:
        """The scales of the blocks of 64, `(blocks,)`."""
        return by_blocks(eight_bits()[self.scale_codes], self.second, SCALES_BLOCK) + self.mean

    def numbers(self) -> Tensor:
        """Returns the weights that they stand for, in a row."""
        return by_blocks(quantiles()[self.codes], self.scales, BLOCK)

    def packed(self) -> Tensor:
        """Returns the codes two a byte, the first in the high half."""
        first, second = self.codes.view(-1, 2).T
        return (first * 16 + second).to(torch.uint8)


def quantise(weights: Tensor) -> Quantised:
    """Quantises weights in a row, any number of them."""
    flat = weights.reshape(-1)
    scales = largest(flat, BLOCK)
    codes = nearest(by_blocks(flat, 1 / scales, BLOCK), quantiles())
    mean = scales.mean()
    second = largest(scales - mean, SCALES_BLOCK)
    rest = by_blocks(scales - mean, 1 / second, SCALES_BLOCK)
    return Quantised(codes, nearest(rest, eight_bits()), second, mean)


def largest(values: Tensor, block: int) -> Tensor:
    """Returns the largest magnitude of each block, of a last one that isn't full as well."""
    return torch.stack([part.abs().max() for part in values.split(block)])


def by_blocks(values: Tensor, factors: Tensor, block: int) -> Tensor:
    """Returns the values times the factor of their block."""
    return values * factors.repeat_interleave(block)[: len(values)]


def nearest(values: Tensor, table: Tensor) -> Tensor:
    """Returns the place of the nearest value in an ascending table."""
    return torch.bucketize(values, (table[1:] + table[:-1]) / 2)
