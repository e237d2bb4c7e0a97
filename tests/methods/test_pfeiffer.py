"""Pfeiffer adapters: one bottleneck a block, on the normed sum as published."""

from __future__ import annotations

import graftune as gt
from tests.families import FAMILIES
from tests.methods.changes import learns


def test_a_block_gets_one_after_its_ffn_and_no_norm_trains() -> None:
    for family in ("bert", "gpt2", "t5"):
        model = FAMILIES[family].build()
        found = gt.attach(model, gt.PfeifferAdapter(train_head=False)).state_dict()
        blocks = [block.path for block in gt.anatomy(model).blocks]
        assert {n.rpartition(".")[0] for n in found} == {f"{b}.ffn.adapter" for b in blocks}


def test_the_published_settings_are_the_defaults() -> None:
    method = gt.PfeifferAdapter()
    assert (method.placement, method.skips, method.init) == ("adapterhub", "answer", "bert")
    assert (method.reduction, method.activation, method.scale) == (16, "relu", 1.0)
    assert not method.train_norms


def test_the_placement_says_what_is_read() -> None:
    kinds = {"adapterhub": {"residual", "norm"}, "simple": set[str](), "result": set[str]()}
    for placement, fields in kinds.items():
        method = gt.PfeifferAdapter(placement=placement)
        adapter = gt.attach(FAMILIES["bert"].build(), method)
        assert adapter.grafts[0].delta.reads == fields


def test_training_learns() -> None:
    first, last = learns(gt.PfeifferAdapter(reduction=4), "llama")
    assert last < 0.8 * first
