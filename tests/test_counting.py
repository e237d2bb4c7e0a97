"""What is attached, counted: trained, changed when applied, rank, bytes."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import graftune as gt
from graftune.counting import Summary
from tests.contract.subjects import shake, tensors
from tests.families import FAMILIES


def summary(family: str, method: Any, **options: Any) -> Summary:
    model = FAMILIES[family].build(**options)
    gt.attach(model, method)
    return gt.summary(model)


@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("bert", gt.LoRA(r=2)),
        ("gpt2", gt.LoRA(r=2, targets="qv")),
        ("vit", gt.LoRA(r=2, targets=("projection", "q_proj"))),
        ("mixtral", gt.LoRA(r=2, targets="down")),
        ("llama", gt.LoRA(r=2, targets="qv", trainable_tokens=(7, 8))),
        ("gpt2", gt.LoRA(r=2, targets="qv", trainable_tokens=(7, 8))),
        ("bert", gt.BitFit(subset="no-norm")),
        ("bert", gt.FullFineTuning(keep_base=True)),
        ("gpt2", gt.FullFineTuning(keep_base=True)),
    ],
)
def test_changed_is_what_merging_changes(family: str, method: Any) -> None:
    model = FAMILIES[family].build()
    before = tensors(model)
    shake(gt.attach(model, method, seed=0), seed=1)
    found = gt.summary(model)
    tied = set(before) - {n for n, _ in model.named_parameters()}
    gt.merge(model, "default")
    after = tensors(model)
    changed = sum(int((after[n] != before[n]).sum()) for n in before if n not in tied)
    rounding = 0.002 * found.changed  # a few changes are too small to move their entry
    assert found.changed - rounding <= changed <= found.changed


def test_an_empty_adapter_changes_nothing_to_speak_of() -> None:
    found = gt.summary(FAMILIES["bert"].build())
    assert (found.sites, found.bytes, found.changed) == ((), 0, 0)
    assert found.trainable == found.base
    assert found.share == 1


def test_sites_sum_up_to_the_whole() -> None:
    found = summary("bert", gt.LoRA(r=2, bias="lora_only"))
    assert found.trainable == sum(site.trainable for site in found.sites)
    assert found.changed == sum(site.changed for site in found.sites)
    assert found.bytes == sum(site.bytes for site in found.sites) == 4 * found.trainable
    assert found.share == found.trainable / found.base
    assert found.base == sum(p.numel() for p in FAMILIES["bert"].build().parameters())
    kinds = {site.kind for site in found.sites}
    assert kinds == {"LowRank", "OwnValue", "head"}


def test_a_low_rank_site_says_its_rank() -> None:
    found = summary("bert", gt.LoRA(r=2, targets="qv", train_head=False))
    assert [site.rank for site in found.sites] == [2] * 4
    assert {(site.trainable, site.changed) for site in found.sites} == {(128, 1024)}
    assert found.sites[0].place == "bert.encoder.layer.0.attention.self.query"


def test_bytes_are_of_the_adapters_own_type() -> None:
    found = summary("bert", gt.LoRA(r=2), dtype=torch.bfloat16)
    assert found.bytes == 4 * found.trainable


def test_several_adapters_are_counted_apart_and_trained_ones_alone() -> None:
    model = FAMILIES["bert"].build()
    one, two = (gt.attach(model, gt.LoRA(r=r), name) for r, name in ((2, "one"), (4, "two")))
    found = gt.summary(model)
    assert found.trainable == two.count()
    assert found.bytes == 4 * (one.count() + two.count())
    for adapter in (one, two):
        own = [site.trainable for site in found.sites if site.adapter == adapter.name]
        assert sum(own) == adapter.count()
    gt.activate(model, None)
    assert gt.summary(model).trainable == 0


def test_in_place_every_tensor_is_a_site() -> None:
    model = FAMILIES["gpt2"].build()
    gt.attach(model, gt.FullFineTuning())
    found = gt.summary(model)
    assert found.trainable == found.changed == found.base
    assert len(found.sites) == len(list(model.parameters()))


def test_a_merged_adapter_is_still_counted() -> None:
    model = FAMILIES["bert"].build()
    gt.attach(model, gt.LoRA(r=2))
    before = gt.summary(model)
    gt.merge(model, "default")
    assert gt.summary(model).sites == before.sites
    assert gt.summary(model).base == before.base


def test_it_is_json_and_a_table() -> None:
    found = summary("bert", gt.LoRA(r=2))
    again = json.loads(json.dumps(found.to_dict()))
    assert list(again) == ["trainable", "changed", "base", "share", "bytes", "sites"]
    assert again["sites"][0]["place"] == found.sites[0].place
    table = str(found).splitlines()
    assert table[0].split() == ["place", "trained", "changed", "rank"]
    assert "default: bert.encoder.layer.*.attention.self.query x2" in table[1]
    assert table[-1].startswith(f"trainable {found.trainable:,} of {found.base:,} (")
    assert all(len(line) < 100 for line in table[:-1])
