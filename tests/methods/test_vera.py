"""VeRA: its equation on every kind of host, what is shared, what is stored, and what it refuses."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import graftune as gt
from graftune.errors import SettingsError
from graftune.methods.vera import draw
from tests.contract.subjects import shake
from tests.families import FAMILIES
from tests.methods.changes import (
    HOSTS,
    an_input,
    attached,
    check_equation,
    check_experts,
    learns,
)


def plain(delta: Any, out: int, fan_in: int) -> Tensor:
    """Returns diag(b) B diag(d) A with A and B drawn anew."""
    A, B = draw(len(delta.d), fan_in, out, 0)
    return (torch.diag(delta.b) @ B @ torch.diag(delta.d) @ A).detach()


@pytest.mark.parametrize("kind", HOSTS)
def test_the_change_is_the_equation(kind: str) -> None:
    host, delta = attached(kind, gt.VeRA, r=12)
    change = plain(delta, *delta.weight_change().shape)
    if kind.endswith("convolution"):
        change = change.reshape(host.weight.shape)
    check_equation(kind, host, change)


def test_a_slice_changes_its_rows_alone() -> None:
    model = FAMILIES["gpt2"].build()
    host: Any = model.transformer.h[0].attn.c_attn
    x = torch.randn(4, 32)
    before = host(x)
    shake(gt.attach(model, gt.VeRA(r=12, targets="qv")), seed=1)
    deltas = host.deltas["default"]
    expected = before.clone()
    expected[:, :32] += x @ plain(deltas["query"], 32, 32).t()
    expected[:, 64:] += x @ plain(deltas["value"], 32, 32).t()
    torch.testing.assert_close(host(x), expected, atol=3e-6, rtol=1e-5)


def test_experts_have_vectors_each_around_one_pair() -> None:
    A, B = draw(12, 80, 32, 0)

    def change(delta: Any, e: int) -> Tensor:
        return torch.diag(delta.b[e]) @ B @ torch.diag(delta.d[e]) @ A

    check_experts(gt.VeRA(r=12, targets=("down_proj",)), "down_proj", change)


def test_all_matrices_take_corners_of_one_pair() -> None:
    model = FAMILIES["llama"].build()
    adapter = gt.attach(model, gt.VeRA(r=12))
    shared = {id(graft.delta.common) for graft in adapter.grafts}
    assert len(shared) == 1
    common: Any = adapter.grafts[0].delta.common
    assert common.vera_A.shape == (12, 80)
    assert common.vera_B.shape == (80, 12)
    delta: Any = model.model.layers[1].self_attn.k_proj.deltas["default"]
    A, B = delta.corners()
    assert torch.equal(A, common.vera_A[:, :32])
    assert torch.equal(B, common.vera_B[:16])
    assert not any(t.requires_grad for t in (common.vera_A, common.vera_B))


def test_two_adapters_have_a_pair_each() -> None:
    model = FAMILIES["llama"].build()
    first, second = (gt.attach(model, gt.VeRA(r=r), f"r{r}") for r in (4, 8))
    assert first.grafts[0].delta.common is not second.grafts[0].delta.common


@pytest.mark.parametrize("saved", [False, True])
def test_the_pair_is_stored_once_or_not_at_all(saved: bool, tmp_path: Path) -> None:
    model = FAMILIES["bert"].build()
    adapter = gt.attach(model, gt.VeRA(r=12, save_projection=saved))
    names = [n for n in adapter.state_dict() if n.startswith("vera_")]
    assert names == (["vera_A", "vera_B"] if saved else [])
    assert len(adapter.state_dict()) == 2 * 12 + 2 + 2 * saved
    adapter.save(tmp_path / "a")
    numbers = gt.inspect(tmp_path / "a").parameters
    assert numbers - adapter.count() == saved * (12 * 128 + 128 * 12)
    assert gt.summary(model).trainable == adapter.count()


def test_the_draw_is_the_seeds_whatever_torch_is_told() -> None:
    before = torch.get_rng_state()
    expected = draw(6, 5, 4, 3)
    torch.set_default_dtype(torch.float64)
    try:
        again = draw(6, 5, 4, 3)
    finally:
        torch.set_default_dtype(torch.float32)
    for one, other in zip(expected, again, strict=True):
        assert torch.equal(one, other)
        assert other.dtype == torch.float32
    assert not torch.equal(draw(6, 5, 4, 4)[0], expected[0])
    assert torch.equal(torch.get_rng_state(), before)
    # Numbers written down, so that a torch which draws others is found out.
    A, B = expected
    torch.testing.assert_close(A[0, :3], torch.tensor(FIRST_OF_A), atol=0, rtol=1e-6)
    torch.testing.assert_close(B[0, :3], torch.tensor(FIRST_OF_B), atol=0, rtol=1e-6)


FIRST_OF_A = [-1.08610427, -0.864154279, -0.469195634]
FIRST_OF_B = [-0.478240728, 0.610343814, -0.721275806]


def test_the_draw_is_kaiming_uniform_for_relu() -> None:
    A, B = draw(64, 300, 200, 0)
    for tensor, fan_in in ((A, 300), (B, 64)):
        bound = math.sqrt(6 / fan_in)
        assert 0.99 * bound < tensor.abs().max() <= bound
        assert math.isclose(tensor.std().item(), bound / math.sqrt(3), rel_tol=0.02)


def test_vectors_start_as_the_paper_says_and_b_moves_first() -> None:
    model = FAMILIES["bert"].build()
    adapter = gt.attach(model, gt.VeRA(r=12, train_head=False))
    model(**FAMILIES["bert"].inputs()).logits.pow(2).sum().backward()
    for name, tensor in adapter.named_parameters():
        start = 0.0 if name.endswith(".b") else 0.1
        assert torch.equal(tensor, torch.full_like(tensor, start)), name
        assert bool(tensor.grad.any()) == name.endswith(".b"), name


def test_dropout_falls_on_the_input_in_training() -> None:
    host, delta = attached("linear", gt.VeRA, r=12, dropout=0.5)
    x = an_input("linear")
    calm = host(x)
    host.train()
    torch.manual_seed(3)
    noisy = host(x)
    torch.manual_seed(3)
    kept = torch.nn.functional.dropout(x, 0.5)
    change = plain(delta, 128, 32)
    torch.testing.assert_close(noisy - calm, (kept - x) @ change.t(), atol=3e-6, rtol=1e-4)


def test_a_16_bit_host_has_32_bit_vectors_and_pair() -> None:
    model = FAMILIES["llama"].build(dtype=torch.bfloat16)
    adapter = gt.attach(model, gt.VeRA(r=12))
    assert {t.dtype for t in adapter.state_dict().values()} == {torch.float32}
    twin = gt.attach(FAMILIES["llama"].build(), gt.VeRA(r=12))
    assert torch.equal(adapter.state_dict()["vera_A"], twin.state_dict()["vera_A"])


def test_training_learns() -> None:
    first, last = learns(gt.VeRA(r=64, train_head=False))
    assert last < 0.7 * first


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, r"r is 0, expected at least 1"),
        ({"d_initial": 0.0}, r"d_initial is 0\.0, expected a finite number other than 0"),
        ({"d_initial": math.inf}, r"d_initial is inf"),
        ({"dropout": 1.0}, r"dropout is 1\.0, expected between 0 and 1"),
        ({"projection_seed": -1}, r"projection_seed is -1, expected between 0"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=f"VeRA: {message}"):
        gt.VeRA(**settings)


def test_dropout_on_experts_is_refused_before_anything_is_attached() -> None:
    model = FAMILIES["mixtral"].build()
    with pytest.raises(SettingsError, match=r"VeRA: .*experts.*on which dropout is not possible"):
        gt.attach(model, gt.VeRA(r=12, dropout=0.1))
    assert gt.adapters(model) == {}
