"""Bottleneck adapters: every placement on every kind of block, against blocks computed by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graftune as gt
from graftune.errors import AdapterError, AnatomyError, GraftuneError, SettingsError
from graftune.methods._bottleneck import ACTIVATIONS, BottleneckDelta, BottleneckMethod
from graftune.methods._gate import Gate
from graftune.methods.base import Method
from graftune.sites.base import Seen, SublayerPlace
from tests.contract.subjects import logits, scores, shake
from tests.families import FAMILIES
from tests.methods.blocks import SUBLAYERS, Placed, adapted, change, check_blocks, plainly
from tests.methods.changes import learns

BOTH = ("attention", "ffn")
ALL = ("attention", "cross-attention", "ffn")


def serial(placement: str = "simple", **settings: Any) -> BottleneckMethod:
    """Returns bottlenecks after attention and FFN."""
    kinds = settings.pop("sublayers", BOTH)
    settings = {"reduction": 8, **settings}
    return gt.PfeifferAdapter(sublayers=kinds, placement=placement, **settings)


def by_formula(method: Any, own: Any, h: Tensor, x: Tensor, s: Tensor, norm: Any) -> Tensor:
    """Returns the stream after one sublayer, as `_bottleneck`'s formulas and table say."""
    if isinstance(method, gt.ParallelAdapter):
        read = s if method.reads == "input" else x
        return plainly(norm, x, h + method.scale * change(own, read))
    if method.placement == "simple":
        return plainly(norm, x, h + change(own, h))
    z = plainly(norm, x, h)
    if method.placement == "result":
        return z + change(own, z)
    skip = {"answer": h, "read": z, "sum": h + x}[method.skips]
    return plainly(norm, x, skip + change(own, z))


def check(family: str, method: BottleneckMethod) -> None:
    recorded, tensors = adapted(family, method)

    def placed_in(path: str) -> Placed:
        def placed(kind: str, h: Tensor, x: Tensor, s: Tensor, norm: Any) -> Tensor:
            own = tensors.get(f"{path}.{kind}")
            return plainly(norm, x, h) if own is None else by_formula(method, own, h, x, s, norm)

        return placed

    check_blocks(recorded, placed_in)


METHODS: dict[str, BottleneckMethod] = {
    "simple": serial(),
    "adapterhub": serial("adapterhub"),
    "result": serial("result"),
    "parallel": gt.ParallelAdapter(sublayers=BOTH),
    "parallel, residual": gt.ParallelAdapter(sublayers=BOTH, reads="residual", scale=2),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", SUBLAYERS)
def test_a_block_is_the_formulas(family: str, method: str) -> None:
    check(family, METHODS[method])


@pytest.mark.parametrize("family", ["bert", "llama", "gemma2"])
@pytest.mark.parametrize("skips", ["read", "sum"])
def test_what_the_change_is_added_to_can_be_chosen(family: str, skips: str) -> None:
    check(family, serial("adapterhub", skips=skips))


@pytest.mark.parametrize("method", [serial(sublayers=ALL), gt.ParallelAdapter(sublayers=ALL)])
def test_cross_attention_gets_its_own(method: BottleneckMethod) -> None:
    check("t5", method)
    found = gt.attach(FAMILIES["t5"].build(), method).state_dict()
    assert {n.rpartition(".adapter")[0] for n in found if "cross" in n} == {
        f"decoder.block.{i}.cross-attention" for i in range(2)
    }


def test_only_the_chosen_blocks_get_one() -> None:
    found = gt.attach(FAMILIES["llama"].build(), serial(layers=-1)).state_dict()
    assert {n.partition(".adapter")[0] for n in found} == {
        "model.layers.1.attention",
        "model.layers.1.ffn",
    }


def normed(z: Tensor, own: dict[str, Tensor], which: str) -> Tensor:
    """Returns a LayerNorm's answer, written out."""
    mean, var = z.mean(-1, keepdim=True), z.var(-1, unbiased=False, keepdim=True)
    return (z - mean) / (var + 1e-5).sqrt() * own[f"{which}_weight"] + own[f"{which}_bias"]


OPTIONS: dict[str, dict[str, Any]] = {
    **{f"activation {name}": {"activation": name} for name in ACTIVATIONS},
    "a number": {"scale": -0.5},
    "learned": {"scale": "learned"},
    "channel": {"scale": "channel"},
    "gate": {"gate": "mean-padded", "scale": 3.0},
    "norm before": {"norm_before": True},
    "norm after": {"norm_after": True},
    "norm after the sum": {"norm_after": True, "norm_adds_skip": True},
    "all": {"scale": "channel", "gate": "mean-padded", "norm_before": True, "norm_after": True},
}


@pytest.mark.parametrize("options", OPTIONS)
def test_options_are_the_formula(options: str) -> None:
    settings = OPTIONS[options]
    delta = a_delta(serial(**settings))
    own = {name: tensor.detach() for name, tensor in delta.named_parameters()}
    phi = ACTIVATIONS[settings.get("activation", "relu")]
    h = torch.randn(2, 5, 16)
    z = normed(h, own, "before") if settings.get("norm_before") else h
    scale = settings.get("scale", 1.0)
    expected = (own["scale"] if isinstance(scale, str) else scale) * change(own, z, phi)
    if settings.get("gate"):
        opened = torch.sigmoid(h @ own["gate.weight"][0] + own["gate.bias"])  # (rows, tokens)
        expected = expected * opened.mean(1)[:, None, None]
    if settings.get("norm_adds_skip"):
        expected = normed(h + expected, own, "after")
    else:
        expected = h + (normed(expected, own, "after") if settings.get("norm_after") else expected)
    torch.testing.assert_close(delta(h, Seen()), expected, atol=2e-6, rtol=1e-5)


def a_delta(method: BottleneckMethod, width: int = 16, k: int = 4) -> BottleneckDelta:
    """Returns a delta by itself, off its start, in eval mode."""
    delta = method.delta(width, k, {})
    if method.gate is not None:
        gate = Gate(method.gate, "encoder", width, {})
        for tensor in gate.parameters():  # else what memory held
            torch.nn.init.zeros_(tensor)
        delta.add_module("gate", gate)
    torch.manual_seed(0)
    delta.start("bert")
    with torch.no_grad():
        for tensor in delta.parameters():
            tensor.add_(0.3 * torch.randn_like(tensor))
    return delta.eval()


def test_dropout_drops_features_of_the_change_in_training_alone() -> None:
    delta, h = a_delta(serial(dropout=0.5)), torch.randn(2, 5, 16)
    whole = (delta(h, Seen()) - h).detach()
    dropped = (delta.train()(h, Seen()) - h).detach()
    gone = (dropped - 0).abs() < 1e-6
    assert 0.3 < gone.float().mean() < 0.7
    torch.testing.assert_close(dropped[~gone], 2 * whole[~gone], atol=1e-5, rtol=1e-4)


def test_stochastic_depth_drops_rows_in_training_alone() -> None:
    delta, h = a_delta(serial(stochastic_depth=0.5)), torch.randn(40, 3, 16)
    whole = (delta(h, Seen()) - h).detach()
    dropped = (delta.train()(h, Seen()) - h).detach()
    gone = (dropped.abs() < 1e-6).flatten(1).all(1)
    assert 10 < gone.sum() < 30
    torch.testing.assert_close(dropped[~gone], 2 * whole[~gone], atol=1e-5, rtol=1e-4)


def test_what_a_fusion_sees_is_without_dropout_gate_and_norm() -> None:
    method = serial(
        dropout=0.9, stochastic_depth=0.9, gate="mean-padded", norm_after=True, scale=2.0
    )
    delta, h = a_delta(method).train(), torch.randn(2, 5, 16)
    own = {name: tensor.detach() for name, tensor in delta.named_parameters()}
    parts = delta.bottleneck(h, Seen())
    torch.testing.assert_close(parts.change, 2 * change(own, h), atol=1e-6, rtol=1e-5)
    assert parts.read is h
    assert parts.skip is h


def test_initial_values() -> None:
    for init, std in (("bert", 0.02), ("near-identity", 0.0088)):  # 0.0088: cut at two deviations
        delta = started(serial(init=init))
        for tensor in (delta.down, delta.up):
            assert abs(tensor.std().item() - std) < 0.03 * std
            assert abs(tensor.mean().item()) < 0.01 * std
        if init == "near-identity":
            assert max(delta.down.abs().max(), delta.up.abs().max()) <= 0.02
    delta = started(serial(init="zero-up"))
    assert not delta.up.any()
    assert abs(delta.down.abs().max().item() - 1 / 32) < 1e-4  # uniform in +- 1 / sqrt(1024)
    assert abs(delta.down.std().item() - 1 / 32 / 3**0.5) < 1e-3


def started(method: BottleneckMethod) -> BottleneckDelta:
    delta = method.delta(1024, 512, {})
    torch.manual_seed(0)
    delta.start(method.init)
    return delta


@pytest.mark.parametrize("init", ["bert", "near-identity", "zero-up"])
def test_what_else_is_trained_starts_as_if_it_were_not_there(init: str) -> None:
    method = serial(init=init, norm_before=True, norm_after=True, scale="channel")
    own = dict(started(method).named_parameters())
    assert own.keys() == method.shapes(1024, 512).keys()
    for name in ("scale", "before_weight", "after_weight"):
        assert torch.equal(own[name], torch.ones(1024))
    for name in ("down_bias", "up_bias", "before_bias", "after_bias"):
        assert not own[name].any()


@pytest.mark.parametrize("placement", ["simple", "adapterhub", "result"])
@pytest.mark.parametrize("family", ["bert", "llama", "gpt_neox", "t5"])
def test_zero_up_starts_as_the_base_and_the_others_near_it(family: str, placement: str) -> None:
    model, inputs = FAMILIES[family].build(), FAMILIES[family].inputs()
    base = logits(model, inputs)
    gt.attach(model, serial(placement, init="zero-up"), "zero")
    assert torch.equal(logits(model, inputs), base)
    gt.attach(model, serial(placement, init="near-identity"), "near", seed=0)
    gap = (logits(model, inputs) - base).abs().max()
    assert 0 < gap < 0.05 * base.abs().max()


def test_the_seed_makes_the_same_values() -> None:
    found = [
        gt.attach(FAMILIES["bert"].build(), serial(), seed=seed).state_dict() for seed in (1, 1, 2)
    ]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert not torch.equal(*(f["bert.encoder.layer.0.ffn.adapter.down"] for f in found[1:]))


@pytest.mark.parametrize(
    ("settings", "extra"),
    [
        ({}, 0),
        ({"scale": "learned"}, 1),
        ({"scale": "channel"}, 32),
        ({"gate": "mean-padded"}, 33),
        ({"norm_before": True}, 64),
        ({"norm_after": True, "norm_adds_skip": True}, 64),
    ],
)
def test_count_is_two_d_k_and_biases_and_what_else_was_asked_for(
    settings: dict[str, Any], extra: int
) -> None:
    model = FAMILIES["llama"].build()
    method = serial(**settings)
    expected = 4 * (2 * 32 * 4 + 32 + 4 + extra)
    assert method.count(model, gt.anatomy(model)) == expected
    assert gt.attach(model, method).count() == expected


@pytest.mark.parametrize(
    ("settings", "widths"),
    [
        ({"reduction": 8}, [4, 4]),
        ({"reduction": 0.5}, [64, 64]),
        ({"reduction": 5}, [6, 6]),  # rounded down
        ({"bottleneck": 7}, [7, 7]),
        ({"bottleneck": 7, "reduction": 1000}, [7, 7]),
        ({"reduction": {"0": 4, "default": 16}}, [8, 2]),
        ({"reduction": {"0": 4, "1": 2}}, [8, 16]),
    ],
)
def test_the_width_is_the_bottleneck_or_the_models_over_the_reduction(
    settings: dict[str, Any], widths: list[int]
) -> None:
    found = gt.attach(FAMILIES["llama"].build(), gt.PfeifferAdapter(**settings)).state_dict()
    assert [len(found[f"model.layers.{i}.ffn.adapter.down"]) for i in range(2)] == widths


def test_a_stack_of_several_widths_gets_each_blocks_own() -> None:
    found = gt.attach(FAMILIES["swin"].build(), gt.PfeifferAdapter(reduction=4)).state_dict()
    shapes = [tuple(t.shape) for n, t in found.items() if n.endswith(".down")]
    assert shapes == [(4, 16), (4, 16), (8, 32), (8, 32)]


SERIAL_ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"sublayers": ()}, r"sublayers is \[\], expected one or more different"),
    ({"sublayers": ("ffn", "ffn")}, "one or more different of attention, cross-attention, ffn"),
    ({"sublayers": ("atention",)}, 'expected one of .* Did you mean "attention"'),
    ({"activation": "gellu"}, "activation is 'gellu', .* Did you mean \"gelu\""),
    ({"init": "zero"}, "init is 'zero', expected one of near-identity, bert, zero-up"),
    ({"dropout": 1.0}, "dropout is 1.0, expected between 0 and 1"),
    ({"stochastic_depth": -0.1}, "stochastic_depth is -0.1"),
    ({"bottleneck": 0}, "bottleneck is 0, expected at least 1"),
    ({"bottleneck": 1.5}, "expected int or None"),
    ({"scale": "lerned"}, 'Did you mean "learned"'),
    ({"scale": float("nan")}, "scale is nan, expected a finite number"),
    ({"reduction": 0}, "reduction is 0, expected more than 0"),
    ({"reduction": float("inf")}, "reduction is inf"),
    ({"reduction": {"0": -1}}, "expected more than 0"),
    ({"norm_adds_skip": True}, "norm_adds_skip needs norm_after=True"),
    ({"placement": "after"}, "placement is 'after', expected one of simple, adapterhub, result"),
    ({"skips": "sums"}, "skips is 'sums', .* Did you mean \"sum\""),
    ({"skips": "sum", "placement": "simple"}, 'skips="sum" is for placement="adapterhub"'),
]


@pytest.mark.parametrize(("settings", "words"), SERIAL_ERRORS)
def test_wrong_settings_are_refused_with_what_was_expected(
    settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(SettingsError, match=words):
        gt.PfeifferAdapter(**settings)


PLAN_ERRORS: list[tuple[str, BottleneckMethod, type[GraftuneError], str]] = [
    ("bert", gt.PfeifferAdapter(reduction=33), SettingsError, "leaves no bottleneck: take at most"),
    ("bert", gt.PfeifferAdapter(reduction={"0": 2}), SettingsError, "nothing for block 1, and no"),
    ("bert", gt.PfeifferAdapter(sublayers=("cross-attention",)), AnatomyError, "None of the 2"),
    ("bert", gt.PfeifferAdapter(layers=2), AnatomyError, "Layer 2 is out of range"),
    (
        "swin",
        serial("adapterhub"),
        SettingsError,
        r'blocks.0.attention is added to, .* sees windows, .*: take placement="simple"',
    ),
    (
        "swin",
        gt.ParallelAdapter(sublayers=BOTH, reads="residual"),
        SettingsError,
        'take reads="input"',
    ),
]


@pytest.mark.parametrize(("family", "method", "kind", "words"), PLAN_ERRORS)
def test_what_does_not_fit_the_model_is_refused_before_anything_is_attached(
    family: str, method: BottleneckMethod, kind: type[GraftuneError], words: str
) -> None:
    model = FAMILIES[family].build()
    with pytest.raises(kind, match=words):
        gt.attach(model, method)
    assert gt.adapters(model) == {}
    assert not any(m._forward_hooks for m in model.modules())


def test_a_gate_is_refused_where_rows_and_tokens_are_one_dimension() -> None:
    model = FAMILIES["opt"].build()
    gt.attach(model, serial(sublayers=("ffn",), gate="mean-padded"))
    with pytest.raises(AdapterError, match=r"tokens of all rows together, \(14, 32\)"):
        logits(model, FAMILIES["opt"].inputs())


@pytest.mark.parametrize(
    "method", [serial("adapterhub", gate="mean-padded"), serial(gate="mean-padded")]
)
def test_a_rows_gate_is_its_own(method: BottleneckMethod) -> None:
    model, inputs = FAMILIES["llama"].build(), FAMILIES["llama"].inputs(batch=3)
    for name, seed in (("a", 1), ("b", 2)):
        shake(gt.attach(model, method, name), seed=seed, noise=0.3)
    with gt.using(model, gt.Rows(["b", None, "a"])):
        mixed = logits(model, inputs)
    for row, name in enumerate(["b", None, "a"]):
        with gt.using(model, name):
            torch.testing.assert_close(mixed[row], logits(model, inputs)[row])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_bf16_hosts_keep_their_dtype_and_the_adapter_its_32_bits(family: str, method: str) -> None:
    model, inputs = FAMILIES[family].build(dtype=torch.bfloat16), FAMILIES[family].inputs()
    base = logits(model, inputs)
    chosen: dict[str, Any] = {"train_head": False, "gate": "mean-padded", "norm_before": True}
    settings = {**METHODS[method].to_dict(), **chosen, "init": "zero-up", "scale": "channel"}
    adapter = gt.attach(model, Method.from_dict(settings))
    assert {t.dtype for t in adapter.parameters()} == {torch.float32}
    assert torch.equal(logits(model, inputs), base)
    shake(adapter, seed=1, noise=0.2)
    now = logits(model, inputs)
    assert now.dtype is torch.bfloat16
    assert not torch.equal(now, base)


DROPPED = ("bert", "t5", "vit", "swin", "distilbert", "gpt2", "opt", "llama")


@pytest.mark.parametrize("family", DROPPED)
def test_beside_the_bases_dropout_zero_up_trains_from_the_bases_pass(family: str) -> None:
    kind = FAMILIES[family]
    model, inputs = kind.build(dropout=0.2).train(), kind.inputs()
    torch.manual_seed(5)
    base = scores(model(**inputs))
    gt.attach(model, gt.HoulsbyAdapter(bottleneck=4, init="zero-up"))
    torch.manual_seed(5)
    assert torch.equal(scores(model(**inputs)), base)


def test_a_dropout_that_sublayers_share_is_left_alone() -> None:
    for family in ("vit", "swin"):
        model = FAMILIES[family].build(dropout=0.2)
        adapter = gt.attach(model, gt.HoulsbyAdapter(bottleneck=4, train_norms=False))
        places = [graft.place for graft in adapter.grafts]
        hosts = [place.module for place in places if isinstance(place, SublayerPlace)]
        assert len(set(hosts)) == len(hosts)
        assert not any(isinstance(model.get_submodule(h), nn.Dropout) for h in hosts)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5"])
@pytest.mark.parametrize(
    "method",
    [
        serial("adapterhub", skips="sum", gate="mean-padded", norm_after=True),
        serial("result", scale="channel"),
        gt.ParallelAdapter(sublayers=BOTH, reads="residual", norm_before=True),
    ],
)
def test_checkpointing_changes_no_gradient(
    method: BottleneckMethod, family: str, reentrant: bool
) -> None:
    found: list[dict[str, Tensor]] = []
    for checkpointed in (False, True):
        model = FAMILIES[family].build().train()
        adapter = gt.attach(model, method, seed=0)
        shake(adapter, seed=1)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        scores(model(**FAMILIES[family].inputs())).float().pow(2).mean().backward()
        found.append({n: t.grad for n, t in adapter.named_parameters() if t.grad is not None})
    plain, again = found
    assert plain.keys() == again.keys()
    for name, gradient in again.items():
        torch.testing.assert_close(gradient, plain[name], atol=1e-6, rtol=1e-4)


def test_every_tensor_gets_a_gradient() -> None:
    method = serial(
        "adapterhub", scale="learned", gate="mean-padded", norm_before=True, norm_after=True
    )
    model = FAMILIES["bert"].build()
    adapter = gt.attach(model, method, seed=0)
    F.cross_entropy(model(**FAMILIES["bert"].inputs()).logits, torch.tensor([0, 1])).backward()
    assert all(t.grad is not None and t.grad.any() for t in adapter.parameters())


@pytest.mark.parametrize("method", [*METHODS.values(), serial(scale="channel", init="zero-up")])
def test_training_learns(method: BottleneckMethod) -> None:
    first, last = learns(method, "gpt2")
    assert last < 0.8 * first


def test_settings_survive_their_file() -> None:
    method = serial("adapterhub", reduction={"1": 4, "default": 8.0}, scale="channel")
    again = Method.from_dict(method.to_dict())
    assert again == method
