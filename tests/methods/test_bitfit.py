"""BitFit: which biases are trained, their subsets, and models that have none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import graftune as gt
from graftune.errors import SettingsError
from tests.contract.subjects import logits, shake
from tests.families import FAMILIES


def names(family: str, method: gt.BitFit, task: str = "default") -> list[str]:
    """Returns the tensors trained, without the head's."""
    model = FAMILIES[family].build(task=task)  # type: ignore[arg-type]
    adapter = gt.attach(model, method)
    return [n for n, _ in adapter.named_parameters() if not n.startswith(adapter.head_names)]


def test_all_is_every_bias_of_the_body_and_no_norms_weight() -> None:
    model = FAMILIES["bert"].build()
    expected = [n for n, _ in model.bert.named_parameters(prefix="bert") if n.endswith(".bias")]
    assert names("bert", gt.BitFit()) == expected
    assert len(expected) == 18


def test_no_norm_leaves_the_norms_out() -> None:
    found = names("bert", gt.BitFit(subset="no-norm"))
    assert len(found) == 13
    assert not any("LayerNorm" in name for name in found)


def test_query_and_intermediate_are_the_two_that_move_most() -> None:
    assert [
        n.partition("layer.")[2] for n in names("bert", gt.BitFit(subset="query+intermediate"))
    ] == [
        "0.attention.self.query.bias",
        "0.intermediate.dense.bias",
        "1.attention.self.query.bias",
        "1.intermediate.dense.bias",
    ]


def test_a_pattern_matches_whole_names() -> None:
    assert len(names("bert", gt.BitFit(subset=r".*\.key\.bias"))) == 2
    assert names("opt", gt.BitFit(subset=r".*q_proj\.bias", layers=-1)) == [
        "model.decoder.layers.1.self_attn.q_proj.bias"
    ]


def test_layers_keep_to_their_blocks() -> None:
    assert {n.split(".")[3] for n in names("bert", gt.BitFit(layers=1))} == {"1"}


def test_what_merely_has_bias_in_its_name_is_not_trained() -> None:
    for task in ("default", "classification"):  # T5's relative_attention_bias
        with pytest.raises(SettingsError, match=r"no biases outside its head.*Set add_missing"):
            gt.attach(FAMILIES["t5"].build(task), gt.BitFit())  # type: ignore[arg-type]


def test_qwen2_has_biases_on_query_key_and_value_alone() -> None:
    found = names("qwen2", gt.BitFit())
    assert len(found) == 6
    assert {n.split(".")[-2] for n in found} == {"q_proj", "k_proj", "v_proj"}


def test_a_trained_bias_takes_the_place_of_the_bases() -> None:
    model = FAMILIES["bert"].build()
    shake(gt.attach(model, gt.BitFit()), seed=1)
    host: Any = model.bert.encoder.layer[0].intermediate.dense
    own = host.deltas["default"]._modules["bias"].value
    x = torch.randn(3, 32)
    assert not torch.equal(own, host.bias)
    assert torch.equal(host(x), F.linear(x, host.weight, own))


def test_the_bias_of_keys_gets_no_gradient() -> None:
    model = FAMILIES["bert"].build()
    adapter = gt.attach(model, gt.BitFit())
    model(**FAMILIES["bert"].inputs()).logits.pow(2).sum().backward()
    grads = {n: t.grad for n, t in adapter.named_parameters()}
    largest = {k: max(g.abs().max() for n, g in grads.items() if k in n) for k in ("key", "value")}
    assert largest["key"] < 1e-5 * largest["value"]


@pytest.mark.parametrize(("family", "count"), [("llama", 14), ("t5", 32)])
def test_missing_biases_start_at_zero(family: str, count: int) -> None:
    model = FAMILIES[family].build()
    inputs = FAMILIES[family].inputs()
    base = logits(model, inputs)
    adapter = gt.attach(model, gt.BitFit(add_missing=True))
    assert len(list(adapter.parameters())) == count
    assert not any(tensor.any() for tensor in adapter.parameters())
    assert torch.equal(logits(model, inputs), base)
    shake(adapter, seed=1)
    host = model.get_submodule(adapter.grafts[0].place.module)
    x = torch.randn(3, 32)
    own = next(adapter.parameters())
    assert torch.equal(host(x), F.linear(x, host.weight, own))
    gt.activate(model, None)
    assert host.bias is None
    assert torch.equal(logits(model, inputs), base)


def test_missing_biases_join_those_that_are_there() -> None:
    assert len(names("qwen2", gt.BitFit(add_missing=True))) == 14


def test_experts_have_no_place_for_a_bias() -> None:
    found = names("mixtral", gt.BitFit(add_missing=True))
    assert len(found) == 8
    assert all("self_attn" in name for name in found)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"subset": "no_norm"}, ["'no_norm'", "18 biases", 'Did you mean "no-norm"?']),
        ({"subset": "(a"}, ["'(a'", "regular expression"]),
        ({"layers": 7}, ["Layer 7", "2 layers"]),
    ],
)
def test_what_names_nothing_is_refused(settings: dict[str, Any], words: list[str]) -> None:
    model = FAMILIES["bert"].build()
    with pytest.raises(SettingsError) as error:
        gt.attach(model, gt.BitFit(**settings))
    assert all(word in str(error.value) for word in words), str(error.value)
    assert gt.adapters(model) == {}


def test_subsets_choose_among_missing_biases_too() -> None:
    wanted = gt.BitFit(subset="query+intermediate", add_missing=True)
    found = names("llama", wanted)
    assert {n.split(".")[-2] for n in found} == {"q_proj", "gate_proj", "up_proj"}
    assert len(found) == 6
    pattern = gt.BitFit(subset=r".*o_proj\.bias", add_missing=True)
    assert len(names("qwen2", pattern)) == 2
    model = FAMILIES["qwen2"].build()
    with pytest.raises(SettingsError, match="Layer 9 is out of range"):
        gt.attach(model, gt.BitFit(layers=9, add_missing=True))


def test_the_bias_of_a_fused_projection_cant_be_the_querys_alone() -> None:
    model = FAMILIES["gpt2"].build()
    with pytest.raises(SettingsError, match=r"one vector for query and key and value; to train"):
        gt.attach(model, gt.BitFit(subset="query+intermediate"))
    assert len(names("gpt2", gt.BitFit(subset=r".*c_attn\.bias"))) == 2


def test_no_norm_within_blocks_is_attention_and_feed_forward_alone() -> None:
    found = names("bert", gt.BitFit(subset="no-norm", layers=":"))
    assert len(found) == 2 * 6
    assert all(".layer." in name for name in found)


def test_t_fews_variant_trains_new_biases_and_norms_of_t5() -> None:
    model = FAMILIES["t5"].build()
    method = gt.BitFit(add_missing=True, train_norms=True)
    count = method.count(model, gt.anatomy(model))
    adapter = gt.attach(model, method)
    found = [n for n, _ in adapter.named_parameters()]
    assert sum(n.endswith("layer_norm.weight") for n in found) == 12
    assert sum(n.endswith(".bias") for n in found) == 32
    assert adapter.count() == count
