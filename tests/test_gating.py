"""How far gates are open: as the equation has it, without padding, in loaded adapters too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import graftune as gt
from graftune.errors import AdapterError, SettingsError
from graftune.gating import gate_maps
from tests.contract.subjects import shake
from tests.families import FAMILIES

SMALL = gt.UniPELT(length=3, hidden=None, reduction=8, r=2)


def attached(method: Any, family: str) -> tuple[Any, gt.Adapter]:
    model = FAMILIES[family].build()
    adapter = gt.attach(model, method, "task", seed=1)
    shake(adapter, 1, 0.2)
    return model, adapter


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_reading_is_the_mean_and_spread_of_each_examples_real_tokens(side: Any) -> None:
    model, _ = attached(gt.LoRA(r=2, targets="query", gate="token"), "llama")
    inputs = FAMILIES["llama"].inputs(padding=side)
    read: dict[str, torch.Tensor] = {}
    host = model.get_submodule("model.layers.1.self_attn.q_proj")
    handle = host.register_forward_pre_hook(lambda _, args: read.update(x=args[0].detach()))
    found = gt.gates(model, "task", [inputs])
    handle.remove()
    assert len(found) == 2
    [place] = [place for place in found if "layers.1" in place]
    [gate] = [m for n, m in host.named_modules() if n.endswith("gate")]
    opened = torch.sigmoid(read["x"] @ gate.weight[0] + gate.bias[0])
    mask = inputs["attention_mask"].bool()
    assert not mask.all()
    each = torch.stack([row[real].mean() for row, real in zip(opened, mask, strict=True)])
    assert torch.allclose(found[place].mean, each.mean().detach(), atol=1e-6)
    assert torch.allclose(found[place].spread, each.std(correction=0).detach(), atol=1e-6)
    assert (found[place].member, found[place].examples) == ("LoRA", len(mask))


@pytest.mark.parametrize("family", ["bert", "llama", "t5", "opt", "gpt2", "vit"])
def test_every_member_in_every_block_is_read_whatever_the_batches(family: str) -> None:
    model, adapter = attached(SMALL, family)
    inputs = FAMILIES[family].inputs(padding="right" if family != "vit" else None)
    whole = gt.gates(model, "task", [inputs])
    members = {one.member for one in whole.values()}
    assert members == {"PrefixTuning", "PfeifferAdapter", "LoRA"}
    assert len(whole) == sum("gate" in graft.delta._modules for graft in adapter.grafts)
    rows = len(next(iter(inputs.values())))
    single = [{name: value[n : n + 1] for name, value in inputs.items()} for n in range(rows)]
    apart = gt.gates(model, "task", single)
    for place, one in whole.items():
        assert 0 < one.mean.min() <= one.mean.max() < 1
        assert torch.allclose(one.mean, apart[place].mean, atol=1e-5)
        assert torch.allclose(one.spread, apart[place].spread, atol=1e-5)
        assert one.spread.max() > 0
    maps = gate_maps(whole, adapter.anatomy)
    assert [one.title for one in maps] == [
        "How far gates are open",
        "Spread of gates over examples",
    ]
    assert len(maps[0].columns) == len(adapter.anatomy.blocks)


def test_what_is_loaded_reads_the_same_and_training_goes_on(tmp_path: Path) -> None:
    model, adapter = attached(SMALL, "bert")
    inputs = FAMILIES["bert"].inputs(padding="right")
    model.train()
    gt.activate(model, None)
    found = gt.gates(model, "task", [inputs])
    assert model.training
    adapter.save(tmp_path / "saved")
    other = FAMILIES["bert"].build()
    gt.load(other, tmp_path / "saved", name="again")
    again = gt.gates(other, "again", [inputs])
    assert found.keys() == again.keys()
    assert all(torch.equal(found[p].mean, again[p].mean) for p in found)


def test_llama_adapters_gates_are_read_by_head_and_see_no_input() -> None:
    model, adapter = attached(gt.LLaMAAdapter(length=2), "llama")
    inputs = FAMILIES["llama"].inputs()
    found = gt.gates(model, "task", [inputs])
    gates = {graft.place.key: graft.delta.gate for graft in adapter.grafts}
    assert found.keys() == gates.keys()
    for place, one in found.items():
        assert torch.allclose(one.mean, torch.tanh(gates[place].detach()))
        assert not one.spread.any()
    assert len(gate_maps(found, adapter.anatomy)) == 1


def test_a_runs_report_draws_its_gates(tmp_path: Path) -> None:
    from graftune.compare.report.report import render_report
    from graftune.tasks import run
    from graftune.tasks.settings import RunSettings
    from tests.tasks import tiny

    found = run.train(
        RunSettings(
            base=str(tiny.bert(tmp_path / "bert")),
            data=str(tiny.write_jsonl(tmp_path / "mail.jsonl", tiny.mail())),
            method={"name": "unipelt", "length": 2, "hidden": 4, "r": 2, "reduction": 8},
            train={"steps": 2},
            out=str(tmp_path / "run"),
        )
    )
    assert [one["title"] for one in found.heat_maps] == [
        "How far gates are open",
        "Spread of gates over examples",
    ]
    assert "Gates were measured on the validation rows." in found.notes
    assert "How far gates are open" in render_report(found)


def test_dropped_blocks_have_no_reading_and_what_has_no_gate_is_told() -> None:
    model, _ = attached(SMALL, "bert")
    inputs = FAMILIES["bert"].inputs()
    places = gt.gates(model, "task", [inputs], drop=1)
    assert places
    assert not any("layer.0." in place for place in places)
    with pytest.raises(SettingsError, match="gates needs one batch or more"):
        gt.gates(model, "task", [])
    gt.attach(model, gt.LoRA(r=2), "plain")
    with pytest.raises(AdapterError, match='"plain" is LoRA without gates: set gate="auto"'):
        gt.gates(model, "plain", [inputs])
    with pytest.raises(AdapterError, match='Did you mean "task"'):
        gt.gates(model, "tsk", [inputs])
