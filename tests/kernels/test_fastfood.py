"""The fast transform is the plain matrix product, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from graftune.kernels.fastfood import Fastfood, hadamard


def plain_hadamard(n: int) -> Tensor:
    """H[i, j] = (-1)^(number of ones that i and j share)."""
    signs = [[(-1) ** (i & j).bit_count() for j in range(n)] for i in range(n)]
    return torch.tensor(signs, dtype=torch.float64)


@pytest.mark.parametrize("n", [1, 2, 8, 64, 128, 512, 8192])
def test_the_transform_is_hadamards_matrix(n: int) -> None:
    x = torch.randn(n, dtype=torch.float64)
    torch.testing.assert_close(hadamard(hadamard(x)), n * x)
    if n <= 512:
        torch.testing.assert_close(hadamard(x), plain_hadamard(n) @ x)


@pytest.mark.parametrize(
    ("k", "n", "keep"), [(5, 8, 8), (100, 128, 70), (1, 512, 512), (512, 512, 1)]
)
@pytest.mark.parametrize("turned", [False, True])
def test_zeros_behind_and_entries_not_kept_are_left_out(
    k: int, n: int, keep: int, turned: bool
) -> None:
    k, keep = (keep, k) if turned else (k, keep)
    x = torch.randn(k, dtype=torch.float64)
    torch.testing.assert_close(hadamard(x, n, keep), plain_hadamard(n)[:keep, :k] @ x)


def plain_matrix(made: Fastfood) -> Tensor:
    """HGPHB as dense matrices, from the numbers that were drawn."""
    n, low = made.gauss.numel(), made.signs.numel()
    H, G = plain_hadamard(n), torch.diag(made.gauss.double())
    B = torch.diag(torch.cat([made.signs, torch.ones(n - low)]).double())
    spread = torch.zeros(n, n, dtype=torch.float64)
    # Where H B x repeats with period `low`, any permutation that agrees modulo it is the same.
    seen = [0] * low
    for row, source in enumerate(made.source.tolist()):
        spread[row, source + low * seen[source]] = 1
        seen[source] += 1
    assert torch.equal(spread.sum(0), torch.ones(n, dtype=torch.float64))
    whole = H @ G @ spread @ H @ B
    D = made.size
    return (whole / (D * made.gauss.double().square().sum()).sqrt())[:D, : made.d]


@pytest.mark.parametrize(("d", "size"), [(1, 1), (3, 8), (5, 37), (8, 64), (30, 20), (17, 200)])
def test_the_projection_is_the_product_of_its_matrices(d: int, size: int) -> None:
    made, x = Fastfood(d, size, seed=4, device=torch.device("cpu")), torch.randn(d)
    M = plain_matrix(made)
    torch.testing.assert_close(made(x).double(), M @ x.double(), atol=1e-5, rtol=1e-5)
    g = torch.randn(size)
    torch.testing.assert_close(made.fold(g).double(), M.T @ g.double(), atol=1e-5, rtol=1e-5)


def test_the_gradient_is_right() -> None:
    made = Fastfood(6, 40, seed=1, device=torch.device("cpu")).double()
    x = torch.randn(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(made, (x,))


def test_it_keeps_lengths_on_average() -> None:
    x = torch.randn(50)
    lengths = [
        float(Fastfood(50, 3000, seed=s, device=torch.device("cpu"))(x).norm() / x.norm())
        for s in range(20)
    ]
    assert sum(lengths) / 20 == pytest.approx(1, abs=0.02)
    assert min(lengths) > 0.8


def test_a_seed_is_one_projection_and_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    a, b, c = (Fastfood(9, 70, seed, torch.device("cpu")) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    x = torch.randn(9)
    assert torch.equal(a(x), b(x))
    assert not torch.allclose(a(x), c(x))
    torch.testing.assert_close(a(3 * x), 3 * a(x))
    assert not a.state_dict()


PINNED = {
    "signs": [1.0, -1.0, 1.0, -1.0],
    "source": [3, 1, 3, 2, 0, 0, 2, 1],
    "gauss": [-1.2119221687316895, 0.7962812781333923, 0.9328507781028748],
}


def test_drawn_numbers_are_pinned() -> None:
    """A file holds the seed alone, so another draw would be another adapter."""
    made = Fastfood(3, 6, seed=7, device=torch.device("cpu"))
    assert made.signs.tolist() == PINNED["signs"]
    assert made.source.tolist() == PINNED["source"]
    torch.testing.assert_close(made.gauss[:3], torch.tensor(PINNED["gauss"]))


def test_it_is_as_exact_under_autocast_and_in_a_model_cast_to_16_bits() -> None:
    made, x = Fastfood(100, 3000, seed=1, device=torch.device("cpu")), torch.randn(100)
    expected = made(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(made(x), expected)
    made.bfloat16()
    assert torch.equal(made(x), expected)
    half = x.bfloat16().requires_grad_()
    made(half).sum().backward()
    assert half.grad is not None
    assert half.grad.dtype == torch.bfloat16


def test_a_default_device_or_dtype_changes_nothing() -> None:
    x = torch.randn(9)
    expected = Fastfood(9, 70, 1, torch.device("cpu"))(x)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            made = Fastfood(9, 70, 1, torch.device("cpu"))
            assert torch.equal(made(x), expected)
    finally:
        torch.set_default_dtype(torch.float32)
