"""Methods made of methods: MAM, UniPELT and Union are the sum of their parts, and one adapter."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

import graftune as gt
from graftune.errors import AdapterError, SettingsError
from graftune.methods.base import Method
from graftune.sites.base import PlaceBeside
from tests.contract.subjects import logits, shake
from tests.families import FAMILIES
from tests.methods.changes import learns

THREE = gt.Union(
    methods=(
        gt.PrefixTuning(length=3, hidden=None),
        gt.PfeifferAdapter(reduction=8),
        gt.LoRA(r=2, targets="qv"),
    )
)


def attached(method: Any, family: str = "bert", noise: float = 0.2) -> tuple[Any, gt.Adapter]:
    model = FAMILIES[family].build()
    adapter = gt.attach(model, method, "task", seed=1)
    shake(adapter, 1, noise)
    return model, adapter


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_a_union_is_its_parts_stacked(family: str) -> None:
    model, adapter = attached(THREE, family)
    inputs = FAMILIES[family].inputs()
    own, single = adapter.state_dict(), FAMILIES[family].build()
    names = ("prefix", "bottleneck", "lora")
    for name, part in zip(names, THREE.methods, strict=True):
        one = gt.attach(single, part, name)
        one.load_state_dict({key: own[key] for key in one.state_dict()})
    gt.activate(single, gt.Stack(*names))
    torch.testing.assert_close(logits(model, inputs), logits(single, inputs), atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_mam_without_one_part_is_the_other(family: str) -> None:
    method = gt.MAM(length=3, hidden=None, bottleneck=4)
    inputs = FAMILIES[family].inputs()
    for kept, part in (("prefix", method.parts[0]), ("adapter", method.parts[1])):
        model, adapter = attached(method, family)
        alone = FAMILIES[family].build()
        one = gt.attach(alone, part, "task")
        own = adapter.state_dict()
        one.load_state_dict({k: own[k] for k in one.state_dict()})
        for graft in adapter.grafts:
            if isinstance(graft.place, PlaceBeside) and f".{kept}" not in graft.place.key:
                sites: Any = model.get_submodule(graft.place.module).deltas
                del sites._modules[graft.place.site]._modules["task"]
        assert torch.equal(logits(model, inputs), logits(alone, inputs))


def test_mams_settings_are_the_papers() -> None:
    prefix, parallel = gt.MAM(bottleneck=512).parts
    assert isinstance(prefix, gt.PrefixTuning)
    assert isinstance(parallel, gt.ParallelAdapter)
    assert (prefix.length, prefix.hidden) == (30, 800)
    assert (parallel.scale, parallel.bottleneck, parallel.activation) == (4.0, 512, "relu")
    assert (parallel.init, parallel.sublayers) == ("zero-up", ("ffn",))


def test_a_wrong_setting_of_a_part_is_said_when_it_is_made() -> None:
    with pytest.raises(SettingsError, match=r"PrefixTuning: length is 0"):
        gt.MAM(length=0)
    with pytest.raises(SettingsError, match=r"activation is 'rely'.*Did you mean \"relu\""):
        gt.MAM(activation="rely")


def test_the_mlp_of_a_part_is_dropped_when_training_ends(tmp_path) -> None:
    model, adapter = attached(gt.MAM(length=3, hidden=8, bottleneck=4))
    before = logits(model, FAMILIES["bert"].inputs())
    assert any(name.endswith("W1") for name in adapter.state_dict())
    adapter.finish()
    assert not any(name.endswith("W1") for name in adapter.state_dict())
    assert torch.equal(logits(model, FAMILIES["bert"].inputs()), before)
    again = FAMILIES["bert"].build()
    gt.load(again, adapter.save(tmp_path / "a"))
    assert torch.equal(logits(again, FAMILIES["bert"].inputs()), before)


def test_settings_and_files_hold_the_parts(tmp_path) -> None:
    model, adapter = attached(THREE)
    assert Method.from_dict(json.loads(json.dumps(THREE.to_dict()))) == THREE
    made = gt.Union(methods=({"name": "lora", "r": 2, "targets": "qv"}, {"method": "BitFit"}))
    assert made.parts == (gt.LoRA(r=2, targets="qv"), gt.BitFit())
    again = FAMILIES["bert"].build()
    loaded = gt.load(again, adapter.save(tmp_path / "a"))
    assert loaded.method == THREE
    assert torch.equal(
        logits(again, FAMILIES["bert"].inputs()), logits(model, FAMILIES["bert"].inputs())
    )


def test_penalties_schedules_and_rates_are_those_of_the_parts() -> None:
    method = gt.Union(
        methods=(
            gt.AdaLoRA(r=4, target_r=2, targets="attention", tinit=1, tfinal=1, delta_t=1),
            gt.LoRA(r=2, targets="ffn", lr_ratio=4),
        )
    )
    model, adapter = attached(method)
    assert method.needs_steps(adapter)
    adapter.begin(6)
    groups = method.param_groups(adapter, 0.1) or []
    rates = {id(p): g["lr"] for g in groups for p in g["params"]}
    ranks: Any = None
    for step in range(1, 7):
        loss = model(**FAMILIES["bert"].inputs()).logits.square().sum() + adapter.penalty()
        loss.backward()
        adapter.advance(step)
    adapter.finish()
    triplets, lora = (share.grafts for share in method.alone(adapter))
    ranks = sum(
        int((g.delta.state_dict()["L"] != 0).sum()) for g in triplets if hasattr(g.delta, "L")
    )
    assert ranks <= 2 * len(triplets)
    assert all(rates[id(g.delta.B)] == pytest.approx(0.4) for g in lora)  # type: ignore[union-attr]
    assert all(rates[id(g.delta.A)] == pytest.approx(0.1) for g in lora)  # type: ignore[union-attr]
    assert not any(id(p) in rates for g in triplets for p in g.delta.parameters())


def test_a_part_that_looks_at_data_does() -> None:
    method = gt.Union(methods=(gt.LoRA(r=2, init="eva", eva_rho=1, targets="qv"), gt.BitFit()))
    model = FAMILIES["bert"].build()
    data = [FAMILIES["bert"].inputs(seed=seed) for seed in range(3)]
    adapter = gt.attach(model, method, "task", data=data)
    A: Tensor = next(g.delta.A for g in adapter.grafts if hasattr(g.delta, "A"))  # type: ignore[assignment]
    assert torch.allclose(A @ A.T, torch.eye(2), atol=1e-4)  # orthonormal, as EVA's directions


@pytest.mark.parametrize(
    ("methods", "words"),
    [
        ((), "methods is empty"),
        ((gt.FullFineTuning(),), "FullFineTuning can't be a part"),
        ((gt.Union(methods=(gt.BitFit(),)),), "Union can't be a part"),
        ((gt.LoRA(train_head=True),), "train_head is set on its part LoRA"),
        ((gt.LoRA(), gt.LoRA()), "LoRA is named twice with the same settings"),
        (("LoRA",), "'LoRA' is no method"),
        (({"r": 3},), "is no method"),
        (({"method": "LoRo"},), 'Did you mean "LoRA"'),
    ],
)
def test_parts_that_cant_be_are_refused(methods: Any, words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        gt.Union(methods=methods)


def test_two_parts_at_one_place_are_refused_with_the_way_out() -> None:
    model = FAMILIES["bert"].build()
    method = gt.Union(methods=(gt.LoRA(targets="qv", r=2), gt.IA3()))
    with pytest.raises(SettingsError, match=r"LoRA and IA3 both change .*value.*gt\.Stack"):
        gt.attach(model, method, "task")
    assert gt.adapters(model) == {}


def test_a_union_merges_if_its_parts_do() -> None:
    model, _ = attached(gt.Union(methods=(gt.LoRA(r=2, targets="qv"), gt.IA3(targets="key"))))
    inputs = FAMILIES["bert"].inputs()
    before = logits(model, inputs)
    gt.merge(model, "task")
    torch.testing.assert_close(logits(model, inputs), before, atol=1e-5, rtol=0)
    other, _ = attached(THREE)
    with pytest.raises(AdapterError, match="can't be merged"):
        gt.merge(other, "task")


def test_rows_are_mixed_if_all_parts_can_be() -> None:
    assert THREE.mixes_rows
    assert not gt.Union(methods=(gt.SAID(d=500), gt.PromptTuning())).mixes_rows


@pytest.mark.parametrize("method", [gt.MAM(length=3, hidden=8), THREE], ids=["mam", "union"])
def test_training_learns(method: Method) -> None:
    first, last = learns(method, "bert")
    assert last < 0.8 * first
