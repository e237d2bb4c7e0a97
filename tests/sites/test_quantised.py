"""Every method acts on bases in 4 and 8 bit, or says why it can't."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import graftune as gt
from graftune.anatomy.packed import elements, is_packed
from graftune.errors import AdapterError, SettingsError
from graftune.sites import hosts, quantised
from tests.contract.subjects import METHODS, logits, shake
from tests.families import FAMILIES
from tests.quantised_bases import quantised as quantised_base

REFUSED = {"full": "FullFineTuning trains every tensor"}


def codes(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if is_packed(p)}


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("name", [n for n in METHODS if n != "gain"])
def test_every_method_trains_saves_and_loads_beside_codes(name, family, tmp_path):
    model, inputs = quantised_base(family), FAMILIES[family].inputs(padding="right")
    before, base = codes(model), logits(model, inputs)
    assert before
    if name in REFUSED:
        with pytest.raises(SettingsError, match=REFUSED[name]):
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
