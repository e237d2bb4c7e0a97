"""LoftQ starts from what quantising lost, read from the checkpoint."""

import copy

import pytest
import torch
from peft.utils.loftq_utils import _low_rank_decomposition
from safetensors.torch import load_file

import graftune as gt
from graftune.errors import SettingsError
from graftune.sites import originals, quantised
from tests.contract.subjects import logits
from tests.families import FAMILIES
from tests.quantised_bases import plain as plain_base
from tests.quantised_bases import quantised as quantised_base

NAME = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    plain_base("llama").save_pretrained(folder, max_shard_size="40KB")
    return folder


def placed(checkpoint, family="llama"):
    model = quantised_base(family)
    originals.remember(model, checkpoint)
    return model


def test_the_start_is_the_one_that_hf_peft_takes(checkpoint):
    model = placed(checkpoint)
    adapter = gt.attach(model, gt.LoRA(r=4, init="loftq"))
    weight = plain_base("llama").get_submodule(NAME).weight.detach()
    lost = weight - quantised.numbers(model.get_submodule(NAME))
    theirs = _low_rank_decomposition(lost, reduced_rank=4)
    delta = next(g.delta for g in adapter.grafts if g.place.module == NAME)
    product = delta.B @ delta.A
    assert torch.allclose(product, theirs["L"] @ theirs["R"], atol=1e-5)
    assert (lost - product).norm() < 0.9 * lost.norm()


@pytest.mark.parametrize("alpha", [4, 16])
def test_answers_are_nearer_to_those_before_quantising(checkpoint, alpha):
    inputs = FAMILIES["llama"].inputs()
    exact, model = logits(plain_base("llama"), inputs), placed(checkpoint)
    before = (logits(model, inputs) - exact).norm()
    gt.attach(model, gt.LoRA(r=32, alpha=alpha, init="loftq"))
    assert (logits(model, inputs) - exact).norm() < 0.5 * before


def test_a_saved_adapter_needs_no_checkpoint(checkpoint, tmp_path):
    model, inputs = placed(checkpoint), FAMILIES["llama"].inputs()
    gt.attach(model, gt.LoRA(r=4, init="loftq"), "x").save(tmp_path / "x")
    assert load_file(tmp_path / "x" / "adapter_model.safetensors")
    fresh = quantised_base("llama")
    gt.load(fresh, tmp_path / "x")
    assert torch.equal(logits(fresh, inputs), logits(model, inputs))


def test_a_head_class_finds_the_bodys_names(tmp_path):
    plain_base("bert").base_model.save_pretrained(tmp_path)
    model = quantised_base("bert")
    originals.remember(model, tmp_path)
    lost = originals.residual(model, "bert.encoder.layer.0.attention.self.query")
    assert lost.norm() > 0


def test_a_transposed_weight_is_turned(checkpoint, tmp_path):
    plain = plain_base("llama")
    host = plain.get_submodule(NAME)
    host.weight.data = host.weight.data.t().contiguous()
    plain.save_pretrained(tmp_path)
    found = originals.residual(placed(tmp_path), NAME)
    assert torch.equal(found, originals.residual(placed(checkpoint), NAME))


def test_what_can_not_be_corrected_is_refused(checkpoint, tmp_path):
    method = gt.LoRA(r=4, init="loftq")
    with pytest.raises(SettingsError, match="none of the targets is quantised"):
        gt.attach(plain_base("llama"), method)
    with pytest.raises(SettingsError, match=r"which holds no model.safetensors; load the base"):
        gt.attach(placed(tmp_path), method)
    with pytest.raises(SettingsError, match='not in "no/where"'):
        gt.attach(placed("no/where"), method)
    other = copy.deepcopy(plain_base("llama"))
    torch.nn.init.normal_(other.get_submodule(NAME).weight)
    other.save_pretrained(tmp_path)
    with pytest.raises(SettingsError, match="with other numbers than it was quantised from"):
        gt.attach(placed(tmp_path), method)
    plain_base("bert").save_pretrained(tmp_path)
    with pytest.raises(SettingsError, match=f"under the name {NAME}.weight"):
        gt.attach(placed(tmp_path), method)
