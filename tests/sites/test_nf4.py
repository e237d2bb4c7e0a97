"""bitsandbytes' NF4 is the paper's: against one written plainly, on a million values."""

from __future__ import annotations

import pytest
import torch

from graftune.sites import quantised
from tests import plain_nf4
from tests.quantised_bases import quantised as quantised_base

functional = pytest.importorskip("bitsandbytes").functional

PUBLISHED = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
    *(0.7229568362236023, 1.0),
)


def test_the_sixteen_values_are_quantiles_of_the_normal_distribution():
    assert torch.allclose(plain_nf4.quantiles(), torch.tensor(PUBLISHED), atol=2e-7)


@pytest.fixture(scope="module")
def both():
    weights = 0.02 * torch.randn(1000, 1000, generator=torch.Generator().manual_seed(0))
    codes, state = functional.quantize_4bit(weights, quant_type="nf4", compress_statistics=True)
    return weights, codes, state, plain_nf4.quantise(weights)


def test_codes_and_scales_of_a_million_values_are_the_plain_ones(both):
    _, codes, state, plain = both
    assert torch.allclose(state.code, plain_nf4.quantiles(), atol=2e-7)
    assert torch.allclose(state.state2.code, plain_nf4.eight_bits(), atol=1e-7)
    assert torch.allclose(state.offset, plain.mean, rtol=1e-6)
    assert torch.allclose(state.state2.absmax, plain.second, rtol=1e-5)
    # 1 / s and x / s round apart, so a value on the edge between two may fall to either.
    assert (codes.flatten() != plain.packed()).float().mean() < 1e-5
    assert (state.absmax != plain.scale_codes).float().mean() < 5e-3
    scales = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    assert (scales - plain.scales).abs().max() < 0.02 * plain.second.max()


def test_a_million_numbers_come_back_as_the_plain_ones(both):
    weights, codes, state, plain = both
    numbers = functional.dequantize_4bit(codes, state).flatten()
    gap = (plain_nf4.quantiles()[1:] - plain_nf4.quantiles()[:-1]).max()
    scales = plain_nf4.by_blocks(torch.ones(10**6), plain_nf4.largest(weights.flatten(), 64), 64)
    assert ((numbers - weights.flatten()).abs() <= (gap / 2 + 0.02) * scales).all()
    assert (numbers - plain.numbers()).norm() < 1e-3 * numbers.norm()
    error = (plain.numbers() - weights.flatten()).square().mean() / weights.square().mean()
    assert error == pytest.approx(0.0085, rel=0.03)  # the paper's block of 64, of normal weights


def test_the_sixteen_levels_come_back_exactly():
    levels = torch.tensor(PUBLISHED).repeat(4) * 3
    codes, state = functional.quantize_4bit(levels, quant_type="nf4")
    assert torch.allclose(functional.dequantize_4bit(codes, state), levels, atol=1e-6)


def test_a_weight_is_read_and_packed_as_the_plain_ones():
    host = quantised_base("llama").model.layers[0].mlp.gate_proj
    wanted = torch.randn(host.out_features, host.in_features)
    quantised.put(host, quantised.packed(host, wanted))
    plain = plain_nf4.quantise(wanted).numbers().view_as(wanted)
    assert (quantised.numbers(host) - plain).norm() < 0.01 * plain.norm()
