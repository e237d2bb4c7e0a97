"""LoHa: its equation on every kind of host, its backward pass, its start, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import graftune as gt
from graftune.errors import SettingsError
from graftune.methods.loha import HadamardProduct
from tests.contract.subjects import shake
from tests.families import FAMILIES
from tests.methods.changes import (
    HOSTS,
    attached,
    check_count_on_a_convolution,
    check_equation,
    check_experts,
    check_uniform,
    learns,
)


def plain(delta: Any, scale: float) -> Tensor:
    """Returns s * (B1 A1) o (B2 A2), entry by entry."""
    out, fan_in = delta.B1.shape[0], delta.A1.shape[1]
    change = torch.empty(out, fan_in)
    for o in range(out):
        first = sum(delta.B1[o, i] * delta.A1[i] for i in range(delta.B1.shape[1]))
        second = sum(delta.B2[o, i] * delta.A2[i] for i in range(delta.B2.shape[1]))
        change[o] = scale * first * second
    return change.detach()


@pytest.mark.parametrize("kind", HOSTS)
def test_the_change_is_the_equation(kind: str) -> None:
    host, delta = attached(kind, gt.LoHa, r=3, alpha=6.0)
    change = plain(delta, scale=2)
    if kind.endswith("convolution"):
        change = change.reshape(host.weight.shape)
    check_equation(kind, host, change)


@pytest.mark.parametrize("kind", ["convolution", "1-D convolution"])
def test_a_core_has_a_matrix_of_rank_r_at_each_tap(kind: str) -> None:
    host, delta = attached(kind, gt.LoHa, r=3, alpha=6.0, tucker=True)
    change = torch.empty(host.weight.shape)
    taps = delta.T1[0, 0].numel()
    for tap in range(taps):
        first, second = (T.flatten(2)[:, :, tap] for T in (delta.T1, delta.T2))
        part = 2 * (delta.B1 @ first @ delta.A1) * (delta.B2 @ second @ delta.A2)
        change.flatten(2)[:, :, tap] = part.detach()
    check_equation(kind, host, change)
    assert delta.T1.shape == (3, 3, *host.kernel_size)


def test_a_slice_changes_its_rows_alone() -> None:
    model = FAMILIES["gpt2"].build()
    host: Any = model.transformer.h[0].attn.c_attn
    x = torch.randn(4, 32)
    before = host(x)
    shake(gt.attach(model, gt.LoHa(r=3, targets="qv")), seed=1, noise=0.3)
    deltas = host.deltas["default"]
    expected = before.clone()
    expected[:, :32] += x @ plain(deltas["query"], 1).t()
    expected[:, 64:] += x @ plain(deltas["value"], 1).t()
    torch.testing.assert_close(host(x), expected, atol=3e-6, rtol=1e-5)


def test_experts_have_a_change_each() -> None:
    def change(delta: Any, e: int) -> Tensor:
        return (delta.B1[e] @ delta.A1[e]) * (delta.B2[e] @ delta.A2[e])

    check_experts(gt.LoHa(r=3, targets=("gate_up_proj",)), "gate_up_proj", change)


def factors(*lead: int) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    shapes = ((5, 2), (2, 4), (5, 2), (2, 4))
    return tuple(torch.randn(*lead, *s, dtype=torch.double, requires_grad=True) for s in shapes)


@pytest.mark.parametrize("lead", [(), (3,)])
def test_the_backward_pass_is_the_gradient_and_has_one(lead: tuple[int, ...]) -> None:
    assert torch.autograd.gradcheck(HadamardProduct.apply, factors(*lead))
    assert torch.autograd.gradgradcheck(HadamardProduct.apply, factors(*lead))


def test_the_backward_pass_keeps_no_more_than_the_factors() -> None:
    kept: list[Tensor] = []
    given = factors()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        HadamardProduct.apply(*given)
    assert sorted(t.shape for t in kept) == sorted(t.shape for t in given)


@pytest.mark.parametrize("r", [1, 2, 4])
def test_the_rank_is_r_squared(r: int) -> None:
    _, delta = attached("linear", gt.LoHa, r=r)
    assert delta.rank == r * r
    assert torch.linalg.matrix_rank(delta.weight_change()) == r * r


def test_the_rank_is_never_above_the_sides() -> None:
    _, delta = attached("grouped heads", gt.LoHa, r=8)
    assert delta.rank == 16
    assert torch.linalg.matrix_rank(delta.weight_change()) == 16


def test_factors_start_kaiming_uniform_and_the_last_at_zero() -> None:
    model = FAMILIES["llama"].build(hidden_size=256)
    gt.attach(model, gt.LoHa(r=64, targets=("q_proj",)), seed=0)
    delta: Any = model.model.layers[0].self_attn.q_proj.deltas["default"]
    for tensor, fan_in in ((delta.A1, 256), (delta.B1, 64), (delta.B2, 64)):
        check_uniform(tensor, fan_in, within=0.03)
    assert not delta.A2.any()


def test_the_first_step_moves_the_last_factor_alone() -> None:
    model = FAMILIES["bert"].build()
    adapter = gt.attach(model, gt.LoHa(r=3, train_head=False), seed=0)
    model(**FAMILIES["bert"].inputs()).logits.pow(2).sum().backward()
    for name, tensor in adapter.named_parameters():
        assert bool(tensor.grad.any()) == name.endswith(".A2"), name


def test_training_learns() -> None:
    first, last = learns(gt.LoHa(r=4, train_head=False))
    assert last < 0.5 * first


@pytest.mark.parametrize("tucker", [False, True])
def test_the_count_of_a_convolution_is_the_formula(tucker: bool) -> None:
    expected = 2 * (3 * (32 + 3) + 9 * 64) if tucker else 2 * 3 * (32 + 3 * 64)
    check_count_on_a_convolution(gt.LoHa, expected, r=3, tucker=tucker)


def test_a_rank_above_the_sides_is_refused() -> None:
    model = FAMILIES["llama"].build()
    with pytest.raises(SettingsError, match=r"r is 17, but .*k_proj is 16x32.*rank_pattern"):
        gt.attach(model, gt.LoHa(r=17, targets=("k_proj",)))
    assert gt.adapters(model) == {}
