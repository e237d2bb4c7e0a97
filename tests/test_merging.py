"""Writing changes into the weights, and taking them out again exactly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import graftune as gt
from graftune.errors import AdapterError
from graftune.sites.parameter import OwnValue
from graftune.sites.placing import replace_deltas
from tests.contract.subjects import logits, same, shake, tensors
from tests.families import FAMILIES

INPUTS = FAMILIES["bert"].inputs()
QUERY = "bert.encoder.layer.0.attention.self.query"


def model_with(family: str, *names: str, method: Any = None, **options: Any) -> Any:
    """Returns a model with an adapter of each name, off its start; the last is active."""
    model = FAMILIES[family].build(**options)
    for seed, name in enumerate(names):
        shake(gt.attach(model, method or gt.LoRA(r=2), name, seed=seed), seed)
    return model


def check_round_trip(model: Any, family: str, composition: Any, atol: float = 1e-5) -> None:
    """Merges and unmerges: the same answers, a plain model between, the same bits after."""
    inputs, before = FAMILIES[family].inputs(), tensors(model)
    gt.activate(model, composition)
    expected = logits(model, inputs)
    gt.merge(model, composition)
    torch.testing.assert_close(logits(model, inputs), expected, atol=atol, rtol=atol)
    assert not same(tensors(model), before)
    gt.unmerge(model)
    assert same(tensors(model), before)
    assert torch.equal(logits(model, inputs), expected)


@pytest.mark.parametrize(
    "variant", ["plain", "dora", "lora_bias", "dora bias", "pissa", "olora", "tokens"]
)
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_every_lora_merges(variant: str, family: str) -> None:
    method = {
        "plain": gt.LoRA(r=2, targets="all-linear"),
        "dora": gt.LoRA(r=2, dora=True),
        "lora_bias": gt.LoRA(r=2, lora_bias=True),
        "dora bias": gt.LoRA(r=2, dora=True, lora_bias=True),
        "pissa": gt.LoRA(r=2, init="pissa"),
        "olora": gt.LoRA(r=2, init="olora"),
        "tokens": gt.LoRA(r=2, trainable_tokens=(7, 8)),
    }[variant]
    check_round_trip(model_with(family, "a", method=method), family, "a")


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "phi3"])
@pytest.mark.parametrize("dora", [False, True])
def test_slices_merge_into_their_rows(family: str, dora: bool) -> None:
    method = gt.LoRA(r=2, targets="qv", dora=dora)
    check_round_trip(model_with(family, "a", method=method), family, "a")


@pytest.mark.parametrize(
    ("family", "targets"), [("vit", ("projection",)), ("mixtral", "ffn"), ("gemma2", "embeddings")]
)
def test_other_hosts_merge(family: str, targets: Any) -> None:
    model = model_with(family, "a", method=gt.LoRA(r=2, targets=targets))
    check_round_trip(model, family, "a", atol=5e-5)


def test_merged_weights_are_the_equation() -> None:
    model = model_with("bert", "a", method=gt.LoRA(r=2, alpha=6))
    host = model.get_submodule(QUERY)
    delta = host.deltas["a"]
    expected = host.weight + 3 * delta.B @ delta.A
    gt.merge(model, "a")
    torch.testing.assert_close(host.weight.data, expected.data)


def test_merging_twice_is_refused() -> None:
    model = model_with("bert", "a", "b")
    gt.merge(model, "a")
    merged = tensors(model)
    for again in ("a", "b", gt.Stack("a", "b")):
        with pytest.raises(AdapterError, match="a is merged already: unmerge before you merge"):
            gt.merge(model, again)
    assert same(tensors(model), merged)


def test_unmerging_twice_is_refused() -> None:
    model = model_with("bert", "a")
    with pytest.raises(AdapterError, match="Nothing is merged"):
        gt.unmerge(model)
    gt.merge(model, "a")
    gt.unmerge(model)
    with pytest.raises(AdapterError, match="Nothing is merged"):
        gt.unmerge(model)


@pytest.mark.parametrize("wrong", [None, gt.Rows(["a", None]), gt.Rows([None])])
def test_what_is_no_change_of_the_whole_is_refused(wrong: Any) -> None:
    model = model_with("bert", "a")
    with pytest.raises(
        AdapterError, match="merge takes an adapter's name or a Stack of names, found"
    ):
        gt.merge(model, wrong)


def test_a_merged_adapter_can_not_be_switched() -> None:
    model = model_with("bert", "a", "b")
    gt.merge(model, "a")
    with pytest.raises(AdapterError, match='"a" is merged: unmerge before you switch it'):
        gt.activate(model, "a")
    with pytest.raises(AdapterError, match='"a" is merged'), gt.using(model, gt.Stack("b", "a")):
        pass
    gt.activate(model, "b")  # acts on top of the merged one


def test_merged_it_is_a_plain_model() -> None:
    plain = FAMILIES["bert"].build()
    modules, keys = [n for n, _ in plain.named_modules()], list(plain.state_dict())
    model = model_with("bert", "a")
    gt.merge(model, "a")
    assert [n for n, _ in model.named_modules()] == modules
    assert list(model.state_dict()) == keys
    assert not any(p.requires_grad for p in model.parameters())
    hooked = [n for n, m in model.named_modules() if m._forward_hooks]
    assert hooked == []


def test_unmerging_brings_back_what_was_active() -> None:
    for before in ("b", None, gt.Stack("b", "a")):
        model = model_with("bert", "a", "b")
        gt.activate(model, before)
        gt.merge(model, "a")
        gt.unmerge(model)
        assert gt.state_of(model).active.current().composition == before


def test_an_unmerged_adapter_trains_on() -> None:
    model = model_with("bert", "a")
    gt.merge(model, "a")
    gt.unmerge(model)
    assert all(t.requires_grad for t in gt.adapters(model)["a"].parameters())
    model(**INPUTS).logits.sum().backward()
    assert any(t.grad is not None and t.grad.any() for t in gt.adapters(model)["a"].parameters())


@pytest.mark.parametrize(
    "methods",
    [
        (gt.LoRA(r=2), gt.LoRA(r=3)),
        (gt.LoRA(r=2), gt.BitFit()),
        (gt.BitFit(), gt.LoRA(r=2, lora_bias=True)),
        (gt.LoRA(r=2), gt.LoRA(r=2, targets="key", bias="lora_only")),
    ],
)
def test_a_stack_merges_as_it_acts(methods: tuple[Any, Any]) -> None:
    model = FAMILIES["bert"].build()
    for seed, (name, method) in enumerate(zip("ab", methods, strict=True)):
        shake(gt.attach(model, method, name, seed=seed), seed)
    check_round_trip(model, "bert", gt.Stack("a", "b"))


def test_a_merged_head_is_the_adapters() -> None:
    model = model_with("bert", "a", "b")
    own = gt.adapters(model)["a"].state_dict()["classifier.weight"]
    gt.merge(model, "a")
    assert torch.equal(model.classifier.weight, own)
    gt.unmerge(model)
    assert not torch.equal(model.classifier.weight, own)


@pytest.mark.parametrize("target", ["wte", "lm_head"])
def test_merging_one_side_of_a_tie_parts_it_until_unmerged(target: str) -> None:
    model = FAMILIES["gpt2"].build()
    method = gt.LoRA(r=2, targets=("c_fc", target))
    shake(gt.attach(model, method, "a", seed=0), seed=1)
    check_round_trip(model, "gpt2", "a")
    embedding, head = model.transformer.wte, model.lm_head
    before = head.weight.detach().clone()
    gt.merge(model, "a")
    assert embedding.weight is not head.weight
    assert not model.config.tie_word_embeddings
    kept = head if target == "wte" else embedding
    assert torch.equal(kept.weight, before)
    gt.unmerge(model)
    assert embedding.weight is head.weight
    assert model.config.tie_word_embeddings


@pytest.mark.parametrize(
    "method", [gt.FullFineTuning(keep_base=True), gt.LoRA(r=2, trainable_tokens=(7, 8))]
)
@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_a_change_of_all_that_is_tied_keeps_the_tie(method: Any, family: str) -> None:
    model = model_with(family, "a", method=method)
    gt.merge(model, "a")
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert model.config.tie_word_embeddings
    gt.unmerge(model)
    check_round_trip(model, family, "a")


def test_a_16_bit_base_is_merged_in_32_bit_and_cast_once() -> None:
    model = model_with("llama", "a", "b", dtype=torch.bfloat16)
    before = tensors(model)
    host = model.model.layers[0].self_attn.q_proj
    changes = {name: host.deltas[name].weight_change() for name in "ab"}
    wide = host.weight.float()
    gt.merge(model, "a")
    assert torch.equal(host.weight, (wide + changes["a"]).to(torch.bfloat16))
    gt.unmerge(model)
    assert same(tensors(model), before)
    assert {p.dtype for p in gt.adapters(model)["a"].parameters()} == {torch.float32}
    gt.merge(model, gt.Stack("a", "b"))
    assert torch.equal(host.weight, (wide + changes["a"] + changes["b"]).to(torch.bfloat16))


def test_a_bias_without_a_place_is_refused_before_anything_changes() -> None:
    model = model_with("llama", "a", method=gt.LoRA(r=2, targets="qv", lora_bias=True))
    before, inputs = tensors(model), FAMILIES["llama"].inputs()
    expected = logits(model, inputs)
    with pytest.raises(AdapterError, match=r'"a" can\'t be merged: it adds a bias, and model\.lay'):
        gt.merge(model, "a")
    assert same(tensors(model), before)
    assert torch.equal(logits(model, inputs), expected)


def test_the_other_adapter_acts_on_top_of_the_merged_one() -> None:
    model = model_with("bert", "a", "b", method=gt.LoRA(r=2, train_head=False))
    gt.activate(model, gt.Stack("a", "b"))
    expected = logits(model, INPUTS)
    gt.merge(model, "a")
    gt.activate(model, "b")
    torch.testing.assert_close(logits(model, INPUTS), expected, atol=1e-5, rtol=1e-5)
    gt.activate(model, None)
    gt.unmerge(model)
    assert same(tensors(model), tensors(FAMILIES["bert"].build()))


class Dropped(OwnValue):
    """A value with noise in training."""

    def forward(self, value: Tensor | None, base: Tensor | None) -> Tensor:
        own = super().forward(value, base)
        return torch.rand_like(own) if self.training else own


def test_what_is_merged_in_training_mode_is_what_acts_in_inference() -> None:
    model = model_with("bert", "a", method=gt.BitFit())
    deltas = {g.delta: Dropped(g.delta.value.data) for g in gt.adapters(model)["a"].grafts}
    replace_deltas(model, gt.adapters(model)["a"].grafts, deltas)
    expected = logits(model, INPUTS)
    model.train()
    gt.merge(model, "a")
    model.eval()
    assert torch.equal(logits(model, INPUTS), expected)
    gt.unmerge(model)
    assert all(graft.delta.training is False for graft in gt.adapters(model)["a"].grafts)
