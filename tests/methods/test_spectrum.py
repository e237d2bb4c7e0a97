"""The incremental decomposition equals that of all vectors at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from graftune.methods._spectrum import Spectrum, leading


def vectors(count: int, width: int, fall: float = 0.5, seed: int = 0) -> Tensor:
    """Returns vectors off the origin whose directions differ clearly in strength."""
    draw = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(width, width, generator=draw))[0]
    strengths = fall ** torch.arange(width)
    return torch.randn(count, width, generator=draw) * strengths @ basis + 3


def whole(x: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns strengths, directions and shares of the centred vectors, the slow way."""
    _, S, V = torch.linalg.svd((x - x.mean(0)).double(), full_matrices=False)
    return S[:size], V[:size], S[:size] ** 2 / (S**2).sum()


@pytest.mark.parametrize("batch", [1, 3, 10, 60])
def test_batches_of_any_size_give_what_all_vectors_give(batch: int) -> None:
    x = vectors(60, 12)
    found = Spectrum(12)
    for start in range(0, 60, batch):
        found.add(x[start : start + batch])
    S, V, shares = whole(x, 12)
    torch.testing.assert_close(found.strengths.double(), S, rtol=1e-4, atol=1e-4)
    assert ((found.directions[:8].double() * V[:8]).sum(1).abs() > 1 - 1e-5).all()
    torch.testing.assert_close(
        torch.tensor(found.explained()).double(), shares, rtol=1e-4, atol=1e-6
    )
    torch.testing.assert_close(found.mean, x.mean(0))
    assert found.count == 60


def test_few_kept_directions_are_the_leading_ones() -> None:
    x = vectors(400, 32)
    found = Spectrum(6)
    for part in x.split(20):
        found.add(part)
    S, V, shares = whole(x, 6)
    assert found.directions.shape == (6, 32)
    assert ((found.directions[:4].double() * V[:4]).sum(1).abs() > 0.999).all()
    torch.testing.assert_close(found.strengths[:4].double(), S[:4], rtol=1e-3, atol=0)
    torch.testing.assert_close(
        torch.tensor(found.explained()[:4]).double(), shares[:4], rtol=2e-3, atol=0
    )


def test_large_matrices_are_decomposed_by_iteration_repeatably() -> None:
    x = vectors(400, 320, fall=0.9)
    x = x - x.mean(0)
    state = torch.get_rng_state()
    strengths, directions = leading(x, 8)
    assert torch.equal(torch.get_rng_state(), state)
    S, V, _ = whole(x, 8)
    torch.testing.assert_close(strengths.double(), S, rtol=1e-3, atol=0)
    assert ((directions.double() * V).sum(1).abs() > 0.999).all()
    torch.testing.assert_close(directions @ directions.t(), torch.eye(8), atol=1e-5, rtol=0)
    assert torch.equal(leading(x, 8)[1], directions)


def test_it_settles_once_directions_hold_still() -> None:
    found = Spectrum(4)
    found.add(vectors(50, 16))
    assert not found.has_settled(2, 0.0)  # nothing to compare with yet
    found.add(vectors(50, 16))  # the same again
    assert found.has_settled(4, 0.999)
    found.add(1e3 * torch.eye(16)[:4])
    assert not found.has_settled(4, 0.999)
    assert not Spectrum(4).has_settled(1, 0.0)


def test_an_empty_batch_and_equal_vectors_are_no_trouble() -> None:
    found = Spectrum(2)
    found.add(torch.empty(0, 4))
    assert found.count == 0
    found.add(torch.ones(3, 4))
    assert found.explained() == [0.0, 0.0]
    found.add(torch.ones(1, 4) * 2)
    assert found.explained()[0] == pytest.approx(1.0)


def test_half_precision_is_widened() -> None:
    found = Spectrum(2)
    found.add(vectors(9, 4).to(torch.bfloat16))
    assert found.directions.dtype == torch.float32
