"""Switching compositions: what they compute together, across methods, and what is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

import graftune as gt
from graftune.errors import AdapterError
from tests.contract.subjects import logits, shake
from tests.families import FAMILIES

METHODS = {
    "lora": gt.LoRA(r=4),
    "bottleneck": gt.PfeifferAdapter(reduction=8),
    "parallel": gt.ParallelAdapter(reduction=8),
    "ia3": gt.IA3(),
    "norms": gt.LayerNormTuning(),
    "prefix": gt.PrefixTuning(length=3, hidden=None),
}
FAMILY = ("bert", "gpt2", "llama", "t5", "opt")


def model_with(family: str, names: Any = METHODS) -> nn.Module:
    model = FAMILIES[family].build()
    for seed, name in enumerate(names):
        shake(gt.attach(model, METHODS[name], name, seed=seed), seed)
    return model


def answer(model: nn.Module, composition: Any, family: str) -> torch.Tensor:
    with gt.using(model, composition):
        return logits(model, FAMILIES[family].inputs())


@pytest.mark.parametrize("family", FAMILY)
def test_an_average_of_alikes_is_each_of_them(family: str) -> None:
    for name, method in METHODS.items():
        model = FAMILIES[family].build()
        first = gt.attach(model, method, "a", seed=1)
        shake(first, 2)
        second = gt.attach(model, method, "b", seed=1)
        second.load_state_dict(first.state_dict())
        alone = answer(model, "a", family)
        mean = answer(model, gt.Average("a", "b"), family)
        assert torch.allclose(mean, alone, atol=1e-5 * max(1.0, alone.abs().max())), name


@pytest.mark.parametrize("family", FAMILY)
def test_an_average_across_methods_goes_from_one_to_the_other(family: str) -> None:
    model = model_with(family)
    for other in METHODS:
        if other == "lora":
            continue
        ends = [answer(model, name, family) for name in ("lora", other)]
        for weights, end in (((1, 0), ends[0]), ((0, 1), ends[1])):
            found = answer(model, gt.Average("lora", other, weights=weights), family)
            assert torch.allclose(found, end, atol=1e-4 * max(1.0, end.abs().max())), other
        middle = answer(model, gt.Average("lora", other), family)
        assert not torch.allclose(middle, ends[0], atol=1e-4)


@pytest.mark.parametrize("family", FAMILY)
def test_a_stack_of_all_methods_acts_alike_in_rows_and_in_parallel(family: str) -> None:
    model = model_with(family)
    stack = gt.Stack(*METHODS)
    whole, one = answer(model, stack, family), answer(model, "lora", family)
    scale = max(1.0, whole.abs().max().item())
    mixed = answer(model, gt.Rows([stack, "lora"]), family)
    assert torch.allclose(mixed[0], whole[0], atol=1e-5 * scale)
    assert torch.allclose(mixed[1], one[1], atol=1e-5 * scale)
    both = answer(model, gt.Parallel(stack, "lora"), family)
    assert torch.allclose(both, torch.cat([whole, one]), atol=1e-5 * scale)


def test_a_stack_differs_by_its_order_where_one_reads_the_other() -> None:
    model = model_with("llama")
    first = answer(model, gt.Stack("bottleneck", "parallel"), "llama")
    assert not torch.allclose(first, answer(model, "bottleneck", "llama"), atol=1e-4)
    other = gt.Stack("parallel", "bottleneck")
    assert not torch.allclose(first, answer(model, other, "llama"), atol=1e-5)


@pytest.mark.parametrize("family", FAMILY)
def test_all_blocks_dropped_is_the_base_below_the_head(family: str) -> None:
    names = [name for name in METHODS if name != "norms"]  # which also act outside the blocks
    model = FAMILIES[family].build()
    for seed, name in enumerate(names):
        shake(gt.attach(model, without_head(METHODS[name]), name, seed=seed), seed)
    base = answer(model, None, family)
    with gt.using(model, gt.Stack(*names), drop=2):
        assert torch.equal(logits(model, FAMILIES[family].inputs()), base)
    with gt.using(model, gt.Stack(*names), drop=1):
        assert not torch.allclose(logits(model, FAMILIES[family].inputs()), base, atol=1e-4)


def without_head(method: Any) -> Any:
    return dataclasses.replace(method, train_head=False)


@pytest.mark.parametrize(
    ("composition", "options", "words"),
    [
        (gt.Average("bottleneck", "lorra"), {}, 'No adapter is named "lorra".*Did you mean .lora'),
        (gt.Parallel("lora", gt.Stack("bottleneck", "x")), {}, 'No adapter is named "x"'),
        (gt.Fuse("lora", "bottleneck"), {}, "No fusion of 'lora', 'bottleneck' is attached"),
        ("lora", {"drop": 3}, "drop leaves out the lowest 3 blocks.*have 2 at most"),
        ("lora", {"drop": gt.AdapterDrop(high=9)}, "drop leaves out the lowest 9 blocks"),
        ("lora", {"drop": -1}, "takes numbers of blocks, 0 or more"),
        ("lora", {"drop": 1.5}, "takes numbers of blocks, 0 or more"),
    ],
)
def test_what_can_not_act_changes_nothing(composition: Any, options: Any, words: str) -> None:
    model = model_with("bert", ["lora", "bottleneck"])
    gt.activate(model, "lora")
    before = answer(model, "lora", "bert")
    with pytest.raises(AdapterError, match=words):
        gt.activate(model, composition, **options)
    with pytest.raises(AdapterError, match=words), gt.using(model, composition, **options):
        pass
    assert torch.equal(logits(model, FAMILIES["bert"].inputs()), before)


@pytest.mark.parametrize(
    "settings", [{"low": 2, "high": 1}, {"low": -1}, {"high": 1.0}, {"rest": True}]
)
def test_a_schedule_that_can_not_be_is_refused(settings: Any) -> None:
    with pytest.raises(AdapterError, match="AdapterDrop takes numbers of blocks"):
        gt.AdapterDrop(**settings)
