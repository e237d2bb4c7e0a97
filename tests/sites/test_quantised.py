"""Every method acts on bases in 4 and 8 bit, or says why it can't."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import graftune as gt
from graftune.anatomy.packed import elements, is_packed
from graftune.errors import AdapterError, AnatomyError, SettingsError
from graftune.sites import hosts, quantised
from tests.contract.subjects import METHODS, logits, shake
from tests.families import FAMILIES
from tests.quantised_bases import plain as plain_base
from tests.quantised_bases import quantised as quantised_base

TRAINED = "are quantised and can't be trained, such as .* load the base in 16 or 32 bit, or leave"
REFUSED = {
    "full": "FullFineTuning trains every tensor, and .* load the base in 16 or 32 bit",
    **dict.fromkeys(("said", "selective", "diffpruning"), TRAINED),
}
"""Methods that change codes in place, with the words that say what to do."""


def codes(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if is_packed(p)}


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("name", [n for n in METHODS if n not in ("gain", "fishmask")])
def test_every_method_trains_saves_and_loads_beside_codes(name, family, tmp_path):
    model, inputs = quantised_base(family), FAMILIES[family].inputs(padding="right")
    before, base = codes(model), logits(model, inputs)
    assert before
    if name in REFUSED:
        with pytest.raises((SettingsError, AnatomyError), match=REFUSED[name]):
            gt.attach(model, METHODS[name])
        return
    adapter = gt.attach(model, METHODS[name], "tiny")
    shake(adapter, seed=1)
    expected = logits(model, inputs)
    assert not torch.equal(expected, base)
    logits_of = model(**inputs).logits
    logits_of.square().mean().backward()
    trained = [p for p in adapter.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
    assert any(p.grad.any() for p in trained)
    assert all(p.dtype == torch.float32 for p in trained)
    now = codes(model)
    assert all(torch.equal(value, now[key]) for key, value in before.items())
    adapter.save(tmp_path / "tiny")
    fresh = quantised_base(family)
    gt.load(fresh, tmp_path / "tiny")
    assert torch.equal(logits(fresh, inputs), expected)
    gt.activate(model, None)
    assert torch.equal(logits(model, inputs), base)


def test_a_fish_mask_is_refused_before_it_looks_at_data():
    with pytest.raises(AnatomyError, match=TRAINED):
        gt.attach(quantised_base("llama"), gt.FishMask(keep=0.05), data=[])


@pytest.mark.parametrize("name", ["said", "diffpruning", "selective"])
def test_what_moves_weights_moves_those_that_are_plain(name):
    method = {
        "said": gt.SAID(d=40, targets="norms"),
        "diffpruning": gt.DiffPruning(targets="norms", keep=0.5),
        "selective": gt.Selective(targets="norms"),
    }[name]
    model, inputs = quantised_base("llama"), FAMILIES["llama"].inputs()
    base = logits(model, inputs)
    adapter = gt.attach(model, method)
    shake(adapter, seed=1)
    assert not torch.equal(logits(model, inputs), base)


@pytest.mark.parametrize("init", ["pissa", "olora", "zero-B"])
@pytest.mark.parametrize("dora", [False, True])
def test_starts_from_the_weight_read_the_codes_numbers(init, dora):
    if init != "zero-B" and dora:
        pytest.skip("DoRA goes with no such start")
    method = gt.LoRA(r=4, init=init, dora=dora)
    model, plain = quantised_base("llama"), quantised_base("llama")
    quantised.open_model(plain)
    adapter, expected = gt.attach(model, method), gt.attach(plain, method)
    for (name, one), (_, other) in zip(
        adapter.state_dict().items(), expected.state_dict().items(), strict=True
    ):
        if init != "zero-B" or name.endswith(".m"):
            assert torch.equal(one, other), name


@pytest.mark.parametrize("scheme", ["nf4", "fp4", "int8"])
def test_gradients_are_those_beside_the_dequantised_weights(scheme):
    model, inputs = quantised_base("llama", scheme), FAMILIES["llama"].inputs()
    plain = copy.deepcopy(model)
    quantised.open_model(plain)
    pairs = []
    for one in (model, plain):
        torch.manual_seed(0)
        adapter = gt.attach(one, gt.LoRA(r=4))
        shake(adapter, seed=1)
        one(**inputs, labels=inputs["input_ids"]).loss.backward()
        pairs.append([p.grad for p in adapter.parameters()])
    # LLM.int8 rounds what goes in as well; its products are not those of the weights alone.
    relative = 0.1 if scheme == "int8" else 1e-5
    for found, expected in zip(*pairs, strict=True):
        assert (found - expected).norm() <= relative * expected.norm()


@pytest.mark.parametrize("scheme", ["nf4", "fp4", "int8"])
def test_codes_count_as_the_numbers_they_stand_for(scheme):
    plain, model = plain_base("llama"), quantised_base("llama", scheme)
    count = sum(p.numel() for p in plain.parameters())
    assert sum(elements(p) for p in model.parameters()) == count
    gt.attach(model, gt.LoRA(r=4))
    assert gt.summary(model).base == count


def test_a_new_bias_trains_beside_a_linear_that_is_quantised():
    model, inputs = quantised_base("llama"), FAMILIES["llama"].inputs()
    adapter = gt.attach(model, gt.BitFit(add_missing=True))
    before = {name: t.clone() for name, t in adapter.state_dict().items()}
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    optimizer.step()
    moved = {name for name, t in adapter.state_dict().items() if not torch.equal(t, before[name])}
    assert {name for name in before if "q_proj.bias" in name} <= moved


def test_turns_of_training_and_evaluating_leave_the_codes_alone():
    model, inputs = quantised_base("llama"), FAMILIES["llama"].inputs()
    gt.attach(model, gt.LoRA(r=4))
    first = logits(model, inputs)
    for _ in range(3):
        model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
        assert torch.equal(logits(model.eval(), inputs), first)


def test_unknown_codes_are_refused_where_numbers_are_needed():
    host = nn.Linear(2, 2)
    host.weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.uint8), requires_grad=False)
    assert hosts.is_quantised(host)
    with pytest.raises(AdapterError, match="16 or 32 bit"):
        hosts.read(host)
    with pytest.raises(AdapterError, match="something unknown"):
        quantised.packed(host, torch.zeros(2, 2))


def merged(scheme, quantized, method=None):
    model, inputs = quantised_base("llama", scheme), FAMILIES["llama"].inputs(padding="left")
    torch.manual_seed(0)
    adapter = gt.attach(model, method or gt.LoRA(r=4), "x")
    shake(adapter, seed=1)
    expected, before = logits(model, inputs), codes(model)
    gt.merge(model, "x", quantized=quantized)
    return model, inputs, expected, before


@pytest.mark.parametrize("method", [gt.LoRA(r=4), gt.LoRA(r=4, dora=True), gt.IA3(), gt.LoKr(r=2)])
@pytest.mark.parametrize("scheme", ["nf4", "fp4"])
def test_a_dequantised_merge_is_exact_and_comes_apart_again(scheme, method):
    model, inputs, expected, before = merged(scheme, "dequantize", method)
    assert torch.allclose(logits(model, inputs), expected, atol=1e-5)
    assert not codes(model)
    assert not model.is_quantized
    assert not hasattr(model.config, "quantization_config")
    gt.unmerge(model)
    assert torch.equal(logits(model, inputs), expected)
    assert model.is_quantized
    assert model.config.quantization_config is not None
    assert all(torch.equal(t, before[n]) for n, t in codes(model).items())


@pytest.mark.parametrize(("scheme", "error"), [("nf4", 0.12), ("fp4", 0.16), ("int8", 0.01)])
def test_a_requantised_merge_rounds_the_sums_and_comes_apart_again(scheme, error):
    exact, *_ = merged(scheme, "dequantize")
    model, inputs, expected, before = merged(scheme, "requantize")
    assert codes(model).keys() == before.keys()
    for name in before:
        host = name.removesuffix(".weight")
        wanted = exact.get_submodule(host).weight
        found = quantised.numbers(model.get_submodule(host))
        assert 0 < (found - wanted).norm() <= error * wanted.norm()
    gt.unmerge(model)
    assert torch.equal(logits(model, inputs), expected)
    assert all(torch.equal(t, before[n]) for n, t in codes(model).items())


def test_a_merge_says_what_becomes_of_the_codes():
    model = quantised_base("llama")
    gt.attach(model, gt.LoRA(r=4), "x")
    with pytest.raises(AdapterError, match=r'whose weight is quantised: .*quantized="dequantize"'):
        gt.merge(model, "x")
    with pytest.raises(SettingsError, match='Did you mean "dequantize"'):
        gt.merge(model, "x", quantized="dequantise")  # type: ignore[arg-type]
    gt.merge(model, "x", quantized="dequantize")
    with pytest.raises(AdapterError, match="x is merged already: unmerge before"):
        gt.merge(model, "x", quantized="dequantize")


def test_biases_merge_into_a_quantised_base_as_into_any():
    model, inputs = quantised_base("bert"), FAMILIES["bert"].inputs()
    shake(gt.attach(model, gt.BitFit(), "x"), seed=1)
    expected, before = logits(model, inputs), codes(model)
    gt.merge(model, "x")
    assert torch.allclose(logits(model, inputs), expected, atol=1e-5)
    assert all(torch.equal(t, before[n]) for n, t in codes(model).items())


def test_a_head_that_is_quantised_is_told_to_be_left_out():
    model = quantised_base("bert", task="classification")
    classifier = model.get_submodule("bert.pooler.dense")
    model.classifier = copy.deepcopy(classifier)
    with pytest.raises(AdapterError, match=r'llm_int8_skip_modules=\["classifier"\]'):
        gt.attach(model, gt.LoRA(r=2, train_head=True))
