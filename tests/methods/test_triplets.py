"""The triplets of AdaLoRA: their change of a weight, what is measured of them, which are pruned."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graftune as gt
from graftune.methods._triplets import FACTORS, Triplets, allocate
from graftune.methods.adalora import triplets_of
from tests.contract.subjects import logits, shake
from tests.families import FAMILIES
from tests.methods.adalora import SMALL, STEPS, attached, kept, step_on

# The equation


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("bert", ("query", "word_embeddings")),
        ("gpt2", "c_attn"),
        ("gpt2", "value"),
        ("gemma2", "embed_tokens"),
        ("vit", "projection"),
        ("mixtral", "ffn"),
    ],
)
def test_the_change_is_s_p_lambda_q(family: str, targets: Any) -> None:
    model = FAMILIES[family].build(**{"tie_word_embeddings": False} if family == "gemma2" else {})
    method = gt.AdaLoRA(**SMALL, targets=targets, alpha=6.0, train_head=False)
    adapter = gt.attach(model, method, seed=0)
    shake(adapter, seed=1, noise=0.3)
    expected = logits(model, FAMILIES[family].inputs())
    gt.activate(model, None)
    with torch.no_grad():
        for graft in adapter.grafts:
            if isinstance(graft.delta, Triplets):
                write(model.get_submodule(graft.place.module), graft)
    torch.testing.assert_close(logits(model, FAMILIES[family].inputs()), expected)


def write(host: nn.Module, graft: Any) -> None:
    """Adds a triplet after another to the host's weight, as the paper writes them."""
    delta, place = graft.delta, graft.place
    parameter: Tensor = getattr(host, place.parameter)
    turned = isinstance(host, nn.Embedding) or hasattr(host, "nf")
    weight = parameter.t() if turned else parameter
    weights = weight if delta.Lambda.ndim == 2 else weight[None]
    P, Lambda, Q = ((t if delta.Lambda.ndim == 2 else t[None]) for t in delta.parameters())
    rows = getattr(place, "rows", None) or [(0, weights.shape[1])]
    at = torch.cat([torch.arange(*run) for run in rows])
    if getattr(delta, "index", None) is not None:
        at = delta.index
    for expert in range(len(weights)):
        for i in range(4):
            outer = torch.outer(P[expert, :, i], Q[expert, i]) * Lambda[expert, i] * 6 / (4 + 1e-5)
            weights[expert, at] += outer.reshape(len(at), *weights.shape[2:])


def test_starts_with_small_normal_factors_and_no_change() -> None:
    model = FAMILIES["llama"].build(hidden_size=256)
    gt.attach(model, gt.AdaLoRA(r=64, targets="q_proj"), seed=0)
    delta: Any = model.get_submodule("model.layers.0.self_attn.q_proj").deltas["default"]
    assert not delta.Lambda.any()
    for tensor in (delta.P, delta.Q):
        assert math.isclose(tensor.std().item(), 0.02, rel_tol=0.03)
        assert abs(tensor.mean().item()) < 1e-3
    assert delta.is_kept.all()


def test_the_first_gradient_is_lambdas_alone() -> None:
    model, adapter = attached()
    adapter.begin(STEPS)
    model(**FAMILIES["bert"].inputs()).logits.pow(2).sum().backward()
    for one in triplets_of(adapter):
        assert one.Lambda.grad is not None
        assert one.Lambda.grad.any()
        for tensor in (one.P, one.Q):
            assert tensor.grad is not None
            assert not tensor.grad.any()


def test_gradients_are_right() -> None:
    model, adapter = attached(targets=("query",), layers=0)
    shake(adapter, seed=2)
    one = triplets_of(adapter)[0].double()
    host = model.get_submodule("bert.encoder.layer.0.attention.self.query").double()
    x = torch.randn(3, host.in_features, dtype=torch.float64)

    def output(P: Tensor, Lambda: Tensor, Q: Tensor) -> Tensor:
        given = dict(zip(FACTORS, (P, Lambda, Q), strict=True))
        return torch.func.functional_call(one, given, (x, host(x), host))

    gt.activate(model, None)
    values = [one.get_parameter(name).detach().requires_grad_() for name in FACTORS]
    assert torch.autograd.gradcheck(output, values)


def test_scale_is_the_released_codes_or_one() -> None:
    assert gt.AdaLoRA(r=12).scale == 12 / (12 + 1e-5)
    assert gt.AdaLoRA(r=12, alpha=24).scale == 24 / (12 + 1e-5)
    assert gt.AdaLoRA(r=12, rank_pattern={"x": 3}).scale == 12 / (12 + 1e-5)
    assert gt.AdaLoRA(scale_form="paper").scale == 1.0


def test_dropout_falls_on_the_input_in_training_alone() -> None:
    model, adapter = attached(dropout=0.5)
    shake(adapter, seed=1)
    inputs = FAMILIES["bert"].inputs()
    assert torch.equal(logits(model, inputs), logits(model, inputs))
    for one in triplets_of(adapter):
        one.train()
    assert not torch.equal(logits(model, inputs), logits(model, inputs))


# What is measured


def test_importance_is_that_of_a_plain_loop() -> None:
    model, adapter = attached(tinit=6, beta1=0.7, beta2=0.6)
    inputs, one = FAMILIES["bert"].inputs(), triplets_of(adapter)[0]
    adapter.begin(STEPS)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    mean = {name: torch.zeros_like(one.get_parameter(name)) for name in FACTORS}
    spread = {name: torch.zeros_like(one.get_parameter(name)) for name in FACTORS}
    for step in range(1, 5):
        optimizer.zero_grad()
        model(**inputs).logits.pow(2).mean().backward()
        optimizer.step()
        adapter.advance(step)
        for name in FACTORS:
            weight: Any = one.get_parameter(name)
            now = (weight * weight.grad).abs().detach()
            mean[name] = 0.7 * mean[name] + 0.3 * now
            spread[name] = 0.6 * spread[name] + 0.4 * (now - mean[name]).abs()
    score = {name: mean[name] * spread[name] for name in FACTORS}
    expected = [
        score["Lambda"][i] + score["P"][:, i].mean() + score["Q"][i].mean() for i in range(4)
    ]
    assert min(expected) > 0
    torch.testing.assert_close(one.importance(), torch.stack(expected))


def test_a_step_that_fp16_skipped_leaves_finite_measurements() -> None:
    _, adapter = attached()
    one = triplets_of(adapter)[0]
    for name in FACTORS:
        one.get_parameter(name).grad = torch.full_like(one.get_parameter(name), float("inf"))
    one.measure(0.85, 0.85)
    assert torch.isfinite(one.importance()).all()


def test_ties_are_pruned_to_the_budget_exactly() -> None:
    _, adapter = attached()
    found = triplets_of(adapter)
    for one in found:
        nn.init.ones_(one.Lambda)
    for wanted in (17, 0, 3, 48):
        allocate(found, wanted)
        assert sum(int(one.is_kept.sum()) for one in found) == wanted
    assert kept(adapter) == 0, "pruning doesn't bring a lambda back"


def test_the_most_important_of_all_matrices_stay() -> None:
    _, adapter = attached()
    found = triplets_of(adapter)
    for index, one in enumerate(found):
        one.sensitivity_Lambda.copy_(torch.arange(4.0) + index)  # type: ignore[operator]
        one.uncertainty_Lambda.fill_(1.0)  # type: ignore[operator]
    allocate(found, 5)
    assert [int(one.is_kept.sum()) for one in found] == [0] * (len(found) - 3) + [1, 2, 2]
    assert found[-1].is_kept.tolist() == [False, False, True, True]


def test_a_pruned_triplet_may_come_back_before_the_end_and_not_after() -> None:
    model, adapter = attached(tinit=1, tfinal=4, delta_t=3)
    counts, pruned = [], []
    for step in range(1, STEPS + 1):
        step_on(model, adapter, 1, first=step)
        counts.append(kept(adapter))
        pruned.append([one.is_kept.clone() for one in triplets_of(adapter)])
    assert counts[2] < 48, "pruned at 3"
    assert counts[4] == 48, "all train again between two prunings"
    assert counts[7:] == [24] * 5, "from the last pruning on, the ranks are fixed"
    for masks in pruned[8:]:
        assert all(torch.equal(a, b) for a, b in zip(masks, pruned[7], strict=True))
