"""LoKr: its equation on every kind of host, how widths are cut, its start, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import graftune as gt
from graftune.errors import SettingsError
from graftune.methods._weight_change import LinearChange
from graftune.methods.lokr import divisors
from tests.contract.subjects import shake
from tests.families import FAMILIES
from tests.methods.changes import (
    HOSTS,
    an_input,
    attached,
    check_count_on_a_convolution,
    check_equation,
    check_experts,
    check_uniform,
    learns,
)


def parts(delta: Any) -> tuple[Tensor, Tensor]:
    """Returns W1 `(a, b)` and W2 `(c, e * taps)` from whatever they are kept as."""
    first = delta.W1 if delta.W1 is not None else delta.W1a @ delta.W1b
    if delta.W2 is not None:
        return first, delta.W2
    if delta.T2 is None:
        return first, delta.W2a @ delta.W2b
    core = delta.T2.flatten(2)
    taps = [delta.W2a @ core[:, :, t] @ delta.W2b for t in range(core.shape[2])]
    return first, torch.stack(taps, dim=2).flatten(1)


VARIANTS: dict[str, dict[str, Any]] = {
    "W2 of rank 2": {"r": 2, "alpha": 3.0},
    "both of rank 1": {"r": 1, "decompose_both": True},
    "both whole": {"r": 8, "alpha": 3.0},
    "W1 of 2 x 2": {"r": 2, "decompose_factor": 2},
    "nothing cut": {"r": 2, "decompose_factor": 1},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", HOSTS)
def test_the_change_is_the_equation(kind: str, variant: str) -> None:
    settings = VARIANTS[variant]
    host, delta = attached(kind, gt.LoKr, **settings)
    scale = settings.get("alpha", settings["r"]) / settings["r"]
    change = scale * torch.kron(*parts(delta)).detach()
    if kind.endswith("convolution"):
        change = change.reshape(host.weight.shape)
    check_equation(kind, host, change)


@pytest.mark.parametrize("kind", ["convolution", "1-D convolution"])
def test_a_core_is_of_w2(kind: str) -> None:
    host, delta = attached(kind, gt.LoKr, r=2, tucker=True)
    assert delta.T2.shape == (2, 2, *host.kernel_size)
    check_equation(kind, host, torch.kron(*parts(delta)).detach().reshape(host.weight.shape))


@pytest.mark.parametrize("kind", ["linear", "Conv1D", "grouped heads"])
def test_by_parts_is_the_dense_change_and_so_are_its_gradients(kind: str) -> None:
    answers: list[list[Tensor]] = []
    for forward in (None, LinearChange.forward):
        host, delta = attached(kind, gt.LoKr, r=2)
        x = an_input(kind).requires_grad_()
        y = torch.zeros(*x.shape[:-1], delta.weight_change().shape[0])
        change = delta(x, y, host) if forward is None else forward(delta, x, y, host)
        answers.append(
            [change, *torch.autograd.grad(change.pow(2).sum(), [x, *delta.parameters()])]
        )
    for by_parts, dense in zip(*answers, strict=True):
        torch.testing.assert_close(by_parts, dense, atol=1e-4, rtol=1e-5)


def test_by_parts_no_matrix_of_the_weights_size_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    host, delta = attached("linear", gt.LoKr, r=2)
    monkeypatch.setattr(type(delta), "weight_change", None)
    host(an_input("linear"))


@pytest.mark.parametrize(
    ("size", "factor", "expected"),
    [
        (768, -1, (24, 32)),
        (3072, -1, (48, 64)),
        (4096, -1, (64, 64)),
        (11008, -1, (86, 128)),
        (50257, -1, (29, 1733)),
        (7, -1, (1, 7)),
        (1, -1, (1, 1)),
        (768, 8, (8, 96)),
        (768, 7, (6, 128)),
        (32, 16, (16, 2)),
    ],
)
def test_widths_are_cut_near_the_root_or_at_the_factor(
    size: int, factor: int, expected: tuple[int, int]
) -> None:
    assert divisors(size, factor) == expected


def test_a_slice_changes_its_rows_alone() -> None:
    model = FAMILIES["phi3"].build()
    host: Any = model.model.layers[0].self_attn.qkv_proj
    x = torch.randn(4, 32)
    before = host(x)
    shake(gt.attach(model, gt.LoKr(r=2, targets="query")), seed=1, noise=0.3)
    expected = before.clone()
    expected[:, :32] += x @ torch.kron(*parts(host.deltas["default"])).t()
    torch.testing.assert_close(host(x), expected, atol=3e-6, rtol=1e-5)


def test_experts_have_a_change_each() -> None:
    def change(delta: Any, e: int) -> Tensor:
        return torch.kron(delta.W1[e], delta.W2a[e] @ delta.W2b[e])

    check_experts(gt.LoKr(r=2, targets=("gate_up_proj",)), "gate_up_proj", change)


@pytest.mark.parametrize(
    ("scaling", "r", "expected"), [("peft", 8, 0.5), ("lycoris", 8, 1), ("lycoris", 2, 2)]
)
def test_the_scale_of_whole_factors_is_peft_s_or_lycoris_s(
    scaling: Any, r: int, expected: float
) -> None:
    _, delta = attached("linear", gt.LoKr, r=r, alpha=4.0, scaling=scaling)
    assert delta.scale == expected


@pytest.mark.parametrize(("r", "both"), [(2, False), (1, True), (8, False)])
def test_the_rank_is_the_product_of_the_factors_ranks(r: int, both: bool) -> None:
    _, delta = attached("linear", gt.LoKr, r=r, decompose_both=both)
    ranks = [int(torch.linalg.matrix_rank(part)) for part in parts(delta)]
    assert delta.rank == math.prod(ranks)
    assert torch.linalg.matrix_rank(delta.weight_change()) == delta.rank


ZEROS = {
    ("zero-W1", False): ("W1",),
    ("zero-W1", True): ("W1a",),
    ("lycoris", False): ("W2b",),
    ("lycoris", True): ("W2b",),
}


@pytest.mark.parametrize(("init", "both"), ZEROS)
def test_one_factor_starts_at_zero_and_moves_first(init: Any, both: bool) -> None:
    model = FAMILIES["bert"].build()
    method = gt.LoKr(r=1, init=init, decompose_both=both, train_head=False)
    adapter = gt.attach(model, method, seed=0)
    model(**FAMILIES["bert"].inputs()).logits.pow(2).sum().backward()
    for name, tensor in adapter.named_parameters():
        is_zero = name.endswith(tuple(f".{end}" for end in ZEROS[init, both]))
        assert bool(tensor.any()) != is_zero, name
        assert bool(tensor.grad.any()) == is_zero, name


def test_the_other_factors_start_kaiming_uniform() -> None:
    model = FAMILIES["llama"].build(hidden_size=256)
    gt.attach(model, gt.LoKr(r=4, targets=("q_proj",), decompose_factor=2), seed=0)
    delta: Any = model.model.layers[0].self_attn.q_proj.deltas["default"]
    for tensor, fan_in in ((delta.W2a, 4), (delta.W2b, 128)):
        check_uniform(tensor, fan_in, within=0.06)


@pytest.mark.parametrize("settings", [{}, {"init": "lycoris", "decompose_both": True}])
def test_training_learns(settings: dict[str, Any]) -> None:
    first, last = learns(gt.LoKr(r=2, train_head=False, **settings))
    assert last < 0.5 * first


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"r": 8}, 4 * 1 + 8 * 3 * 64),  # 32 = 4 * 8, 3 = 1 * 3, 8 x 8 taps
        ({"r": 2}, 4 * 1 + 2 * (8 + 3 * 64)),
        ({"r": 2, "tucker": True}, 4 * 1 + 2 * (8 + 3) + 4 * 64),
        ({"r": 1, "decompose_both": True}, (4 + 1) + (8 + 3 * 64)),
    ],
)
def test_the_count_of_a_convolution_is_the_formula(settings: dict[str, Any], expected: int) -> None:
    check_count_on_a_convolution(gt.LoKr, expected, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decompose_factor": 0}, r"decompose_factor is 0, expected -1 .* or at least 1"),
        ({"decompose_factor": -2}, r"decompose_factor is -2"),
        ({"init": "lycorys"}, r"init is 'lycorys', expected one of zero-W1, lycoris.*lycoris"),
        ({"scaling": "one"}, r"scaling is 'one', expected one of peft, lycoris"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        gt.LoKr(**settings)
