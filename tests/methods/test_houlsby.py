"""Houlsby adapters: two bottlenecks a block, and the norms, as the paper has them."""

from __future__ import annotations

import pytest
import torch

import graftune as gt
from graftune.errors import AdapterError
from tests.contract.subjects import shake
from tests.families import FAMILIES
from tests.methods.changes import learns


def test_a_bert_block_gets_two_and_its_norms_train() -> None:
    adapter = gt.attach(FAMILIES["bert"].build(), gt.HoulsbyAdapter(train_head=False))
    names = [n for n in adapter.state_dict() if n.startswith("bert.encoder.layer.1.")]
    at = "bert.encoder.layer.1"
    bottleneck = ("down", "down_bias", "up", "up_bias")
    assert sorted(names) == sorted(
        [f"{at}.{kind}.adapter.{n}" for kind in ("attention", "ffn") for n in bottleneck]
        + [
            f"{at}.{norm}.LayerNorm.{n}"
            for norm in ("attention.output", "output")
            for n in ("weight", "bias")
        ]
    )


def test_norms_of_the_chosen_blocks_alone_train() -> None:
    found = gt.attach(FAMILIES["llama"].build(), gt.HoulsbyAdapter(layers=0)).state_dict()
    norms = {n for n in found if "norm" in n}
    assert norms == {
        f"model.layers.0.{norm}.weight" for norm in ("input_layernorm", "post_attention_layernorm")
    }


def test_norms_start_as_the_bases_and_can_stay_frozen() -> None:
    model = FAMILIES["bert"].build()
    found = gt.attach(model, gt.HoulsbyAdapter()).state_dict()
    for name in (n for n in found if "LayerNorm" in n):
        assert torch.equal(found[name], model.get_parameter(name))
    frozen = gt.attach(FAMILIES["bert"].build(), gt.HoulsbyAdapter(train_norms=False))
    assert not any("LayerNorm" in n for n in frozen.state_dict())


def test_the_papers_settings_are_the_defaults() -> None:
    method = gt.HoulsbyAdapter()
    assert (method.bottleneck, method.placement, method.init) == (64, "simple", "near-identity")
    assert method.train_norms


def test_it_cannot_be_merged() -> None:
    model = FAMILIES["bert"].build()
    shake(gt.attach(model, gt.HoulsbyAdapter(bottleneck=4)), seed=1)
    with pytest.raises(AdapterError, match="can't be merged"):
        gt.merge(model, "default")


def test_training_learns() -> None:
    first, last = learns(gt.HoulsbyAdapter(bottleneck=8), "t5")
    assert last < 0.8 * first
