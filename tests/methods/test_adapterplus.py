"""Adapter+: the bottleneck on a block's output, with the published settings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import graftune as gt
from tests.contract.subjects import logits
from tests.families import FAMILIES
from tests.methods.blocks import Placed, adapted, change, check_blocks, plainly
from tests.methods.changes import learns


@pytest.mark.parametrize("family", ["vit", "bert", "gemma2"])
def test_a_block_is_the_formula(family: str) -> None:
    recorded, tensors = adapted(family, gt.AdapterPlus(reduction=8))

    def placed_in(path: str) -> Placed:
        def placed(kind: str, h: Tensor, x: Tensor, s: Tensor, norm: Any) -> Tensor:
            z = plainly(norm, x, h)
            own = tensors.get(f"{path}.{kind}")
            return z if own is None else z + own["scale"] * change(own, z, F.gelu)

        return placed

    check_blocks(recorded, placed_in)


def test_the_published_settings_are_the_defaults() -> None:
    method = gt.AdapterPlus()
    assert (method.sublayers, method.reduction, method.stochastic_depth) == (("ffn",), 96, 0.1)
    assert (method.placement, method.scale, method.init) == ("result", "channel", "near-identity")
    same = gt.PfeifferAdapter(
        placement="result",
        scale="channel",
        init="near-identity",
        stochastic_depth=0.1,
        activation="gelu",
        reduction=96,
    )
    assert {**method.to_dict(), "method": ""} == {**same.to_dict(), "method": ""}


def test_rows_are_dropped_in_training_alone() -> None:
    model, inputs = FAMILIES["vit"].build(), FAMILIES["vit"].inputs(batch=4)
    base = logits(model, inputs)
    gt.attach(model, gt.AdapterPlus(reduction=8, stochastic_depth=0.9, train_head=False), seed=0)
    torch.manual_seed(0)
    dropped = (logits(model.train(), inputs) == base).all(-1)
    assert dropped.any()
    assert not (logits(model.eval(), inputs) == base).all(-1).any()


def test_training_learns() -> None:
    first, last = learns(gt.AdapterPlus(reduction=4), "vit")
    assert last < 0.8 * first
