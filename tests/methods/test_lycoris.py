"""What LoHa and LoKr share: dropout of the change, patterns, and acting beside other adapters."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import graftune as gt
from graftune.errors import SettingsError
from tests.contract.subjects import logits, shake
from tests.families import FAMILIES
from tests.methods.changes import HOSTS, an_input, attached

both = pytest.mark.parametrize("make", [gt.LoHa, gt.LoKr])
HALF = {"rank_dropout": 0.5}


def changes(host: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the change of the output in training and out of it, features last."""
    zeros = torch.zeros_like(host(x))
    delta = host.deltas["default"]
    calm, noisy = delta.eval()(x, zeros, host), delta.train()(x, zeros, host)
    if x.ndim == 4 or x.shape[-1] == 20:
        return noisy.movedim(1, -1), calm.movedim(1, -1)
    return noisy, calm


@both
@pytest.mark.parametrize("kind", HOSTS)
def test_rank_dropout_drops_whole_output_features(kind: str, make: Any) -> None:
    more = {"rank_dropout_scale": True} if make is gt.LoKr else {}
    host, _ = attached(kind, make, r=2, **HALF, **more)
    noisy, calm = changes(host, an_input(kind))
    dropped = ~noisy.flatten(0, -2).any(0)
    assert 0 < dropped.sum() < len(dropped)
    torch.testing.assert_close(noisy[..., ~dropped], 2 * calm[..., ~dropped])


def test_lokr_rescales_the_kept_rows_only_if_told() -> None:
    host, _ = attached("linear", gt.LoKr, r=2, **HALF)
    noisy, calm = changes(host, an_input("linear"))
    kept = noisy.flatten(0, -2).any(0)
    torch.testing.assert_close(noisy[..., kept], calm[..., kept])


@both
def test_experts_drop_rows_of_their_own(make: Any) -> None:
    model = FAMILIES["mixtral"].build()
    shake(gt.attach(model, make(r=2, targets="down", **HALF)), seed=1)
    experts: Any = model.model.layers[0].mlp.experts
    delta = experts.deltas["default"]._modules["down_proj"].train()
    moved = (delta(experts.down_proj, experts.down_proj) - experts.down_proj).any(-1)
    assert 0 < moved.sum() < moved.numel()
    assert not torch.equal(moved[0], moved[1])


@both
def test_module_dropout_drops_all_or_nothing(make: Any) -> None:
    host, _ = attached("linear", make, r=2, module_dropout=0.5)
    x, seen = an_input("linear"), list[bool]()
    for _ in range(20):
        noisy, calm = changes(host, x)
        seen.append(bool(noisy.any()))
        torch.testing.assert_close(noisy, calm if seen[-1] else torch.zeros_like(calm))
    assert 2 < sum(seen) < 20


@both
@pytest.mark.parametrize("family", ["bert", "mixtral"])
def test_what_is_merged_has_no_dropout_even_while_training(family: str, make: Any) -> None:
    model = FAMILIES[family].build()
    shake(gt.attach(model, make(r=2, rank_dropout=0.5, module_dropout=0.5)), seed=1)
    inputs = FAMILIES[family].inputs()
    expected = logits(model, inputs)
    gt.merge(model.train(), "default")
    torch.testing.assert_close(logits(model.eval(), inputs), expected, atol=1e-5, rtol=1e-5)


@both
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_repeats_the_dropout(make: Any, reentrant: bool) -> None:
    model = FAMILIES["llama"].build().train()
    adapter = gt.attach(model, make(r=2, rank_dropout=0.3, module_dropout=0.3))
    shake(adapter, seed=1)
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(4)
        model(**FAMILIES["llama"].inputs()).logits.pow(2).mean().backward()
        found.append([t.grad.clone() for t in adapter.parameters()])
        for tensor in adapter.parameters():
            tensor.grad = None
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(again, plain, atol=1e-6, rtol=1e-4)


@both
def test_patterns_give_modules_other_ranks_and_alphas(make: Any) -> None:
    model = FAMILIES["bert"].build()
    method = make(r=4, alpha=8.0, rank_pattern={"query": 2}, alpha_pattern={"value": 2.0})
    gt.attach(model, method)
    attention: Any = model.bert.encoder.layer[0].attention.self
    scales = [m.deltas["default"].scale for m in (attention.query, attention.key, attention.value)]
    assert scales == [4, 2, 0.5]
    assert method.rank_of("bert.encoder.layer.0.attention.self.query") == 2


@both
def test_an_alpha_left_out_follows_the_rank(make: Any) -> None:
    assert make(r=4, rank_pattern={"query": 2}).scale("a.query") == 1


@both
def test_the_change_grows_with_alpha(make: Any) -> None:
    small, large = (attached("linear", make, r=2, alpha=a)[1].weight_change() for a in (1.0, 3.0))
    torch.testing.assert_close(large, 3 * small)


@pytest.mark.parametrize("make", [gt.LoHa, gt.LoKr, gt.VeRA])
@pytest.mark.parametrize("family", ["bert", "gpt2", "mixtral"])
def test_a_stack_with_lora_is_the_sum_of_both_changes(family: str, make: Any) -> None:
    model = FAMILIES[family].build()
    shake(gt.attach(model, gt.LoRA(r=2), "a"), seed=1)
    shake(gt.attach(model, make(r=2, layers=0), "b"), seed=2)
    inputs = FAMILIES[family].inputs()
    gt.activate(model, gt.Stack("a", "b"))
    stacked = logits(model, inputs)
    for name in "ab":
        with gt.using(model, name):
            assert not torch.allclose(logits(model, inputs), stacked)
    gt.merge(model, gt.Stack("a", "b"))
    torch.testing.assert_close(logits(model, inputs), stacked, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("make", [gt.LoHa, gt.LoKr, gt.VeRA])
def test_rows_mix_them_with_lora(make: Any) -> None:
    model = FAMILIES["llama"].build()
    shake(gt.attach(model, gt.LoRA(r=2), "a"), seed=1)
    shake(gt.attach(model, make(r=2), "b"), seed=2)
    inputs = FAMILIES["llama"].inputs(batch=3)
    with gt.using(model, gt.Rows(["a", "b", None])):
        mixed = logits(model, inputs)
    for row, member in enumerate(["a", "b", None]):
        with gt.using(model, member):
            torch.testing.assert_close(mixed[row], logits(model, inputs)[row], atol=2e-6, rtol=2e-5)


@both
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, r"r is 0, expected at least 1"),
        ({"alpha": -1.0}, r"alpha is -1\.0, expected at least 0"),
        ({"rank_dropout": 1.0}, r"rank_dropout is 1\.0, expected between 0 and 1"),
        ({"module_dropout": -0.1}, r"module_dropout is -0\.1"),
        ({"rank_pattern": {"query": 0}}, r'rank_pattern\["query"\] is 0, expected at least 1'),
        ({"alpha_pattern": {"(": 1.0}}, r'alpha_pattern names "\(", which isn\'t a regular'),
        ({"r": 2.5}, r"r is 2\.5 \(float\), expected int"),
    ],
)
def test_wrong_settings_are_named(make: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=rf"{make.name}: {message}"):
        make(**settings)


@both
def test_a_pattern_that_names_nothing_is_refused_before_anything_is_attached(make: Any) -> None:
    model = FAMILIES["bert"].build()
    with pytest.raises(SettingsError, match=r'rank_pattern names "q_proj", which ends none of'):
        gt.attach(model, make(rank_pattern={"q_proj": 2}))
    assert gt.adapters(model) == {}
