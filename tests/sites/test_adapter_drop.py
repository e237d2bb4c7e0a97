"""AdapterDrop in training: what is dropped has no backward pass, and a drawn number holds."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graftune as gt
from graftune.errors import AdapterError
from tests.sites.test_backward_cut import WAYS, loss_of, seen_by, subject

BLOCKS = {"bert": "num_hidden_layers", "llama": "num_hidden_layers", "t5": "num_layers"}
"""Families, and what their number of blocks is called."""
METHODS = {"pfeiffer": gt.PfeifferAdapter(bottleneck=4, init="bert"), "lora": gt.LoRA(r=2)}


def deep(family: str, way: bool | None, method: str = "pfeiffer") -> tuple[Any, gt.Adapter]:
    """Returns a model of four blocks (T5: in each stack) in training."""
    return subject(family, METHODS[method], way, **{BLOCKS[family]: 4})


def stack(model: nn.Module, at: int = 0) -> list[nn.Module]:
    """Returns the blocks of a stack; of T5 the first is the encoder's."""
    return [model.get_submodule(b.path) for b in gt.anatomy(model).stacks[at].blocks]


def note_inside(blocks: list[nn.Module]) -> list[list[Tensor]]:
    """Returns lists to which each block's first linear's outputs come, run again or not."""
    found: list[list[Tensor]] = [[] for _ in blocks]
    for block, mine in zip(blocks, found, strict=True):
        first_linear(block).register_forward_hook(lambda _, __, out, to=mine: to.append(out))
    return found


def first_linear(block: nn.Module) -> nn.Module:
    """Returns a module that is called again where a checkpointed block is."""
    return next(module for module in block.modules() if isinstance(module, nn.Linear))


def silence(delta: Any) -> None:
    """Lets a bottleneck add nothing."""
    delta.up.data.zero_()
    delta.up_bias.data.zero_()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("family", "method"), [*((f, "pfeiffer") for f in BLOCKS), ("bert", "lora")]
)
def test_what_is_dropped_has_no_backward_pass(family: str, method: str, way: bool | None) -> None:
    model, adapter = deep(family, way, method)
    gt.activate(model, adapter.name, drop=2)
    blocks = stack(model)
    outputs = note_inside(blocks)
    with seen_by(blocks[2]) as entering, warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loss = loss_of(model, family)
    assert [(x.requires_grad, x.grad_fn) for x in entering] == [(False, None)]
    assert [(x.requires_grad, x.grad_fn) for out in outputs[:2] for x in out] == [(False, None)] * 2
    loss.backward()
    runs = [len(out) for out in outputs]
    assert runs == [1, 1, 1, 1] if way is None else [1, 1, 2, 2]  # the upper again, for gradients
    anatomy = gt.anatomy(model)
    for name, tensor in adapter.named_parameters():
        block = next((b for b in anatomy.blocks if name.startswith(f"{b.path}.")), None)
        dropped = block is not None and block.position < 2
        assert (tensor.grad is None) == dropped, name


@pytest.mark.parametrize(
    ("family", "way"), [*((f, None) for f in BLOCKS), ("llama", False), ("llama", True)]
)
def test_it_learns_what_an_adapter_of_the_upper_blocks_learns(
    family: str, way: bool | None
) -> None:
    model, adapter = deep(family, way)
    gt.activate(model, adapter.name, drop=2)
    loss_of(model, family).backward()
    plain, other = deep(family, None)
    for graft in other.grafts:
        block = next((b for b in gt.anatomy(plain).blocks if b.path in graft.place.key), None)
        if block is not None and block.position < 2:
            silence(graft.delta)
    loss_of(plain, family).backward()
    for (name, mine), (_, theirs) in zip(
        adapter.named_parameters(), other.named_parameters(), strict=True
    ):
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-6, rtol=1e-4, msg=name)


def test_all_dropped_is_the_base_with_the_adapters_head() -> None:
    model, adapter = deep("bert", None)
    model.eval()
    inputs = {"input_ids": torch.arange(5, 13).reshape(2, 4)}
    with gt.using(model, adapter.name, drop=4):
        dropped = model(**inputs).logits
    for graft in adapter.grafts:
        if not graft.place.parameter:
            silence(graft.delta)
    assert torch.allclose(dropped, model(**inputs).logits, atol=1e-6)


def test_a_schedule_draws_each_number_about_equally_often() -> None:
    model, adapter = deep("bert", None)
    gt.activate(model, adapter.name, drop=gt.AdapterDrop(low=1, high=4))
    active = gt.state_of(model).active
    torch.manual_seed(0)
    drawn: Counter[int] = Counter()
    for _ in range(4000):
        active.draw(training=True)
        drawn[active.current().drop] += 1
    assert sorted(drawn) == [1, 2, 3, 4]
    assert all(900 < count < 1100 for count in drawn.values()), drawn  # 1000, give or take 27


def test_each_training_pass_draws_and_others_drop_none() -> None:
    model, adapter = deep("bert", None)
    gt.activate(model, adapter.name, drop=gt.AdapterDrop(high=4))
    seen: list[int] = []
    active = gt.state_of(model).active
    first_linear(stack(model)[0]).register_forward_hook(
        lambda *_: seen.append(active.current().drop)
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for training in (*[True] * 12, *[False] * 3, *[True] * 12):
            model.train(training)(input_ids=torch.tensor([[5, 6]]))
    assert seen[12:15] == [0, 0, 0]
    assert set(seen) == {0, 1, 2, 3, 4}


def test_a_seed_repeats_what_is_drawn() -> None:
    model, adapter = deep("bert", None)
    gt.activate(model, adapter.name, drop=gt.AdapterDrop(high=4))
    found: list[list[float]] = []
    for _ in range(2):
        torch.manual_seed(3)
        found.append([loss_of(model, "bert").item() for _ in range(6)])
    assert found[0] == found[1]
    assert len(set(found[0])) > 1


@pytest.mark.parametrize("way", [False, True])
@pytest.mark.parametrize("family", BLOCKS)
def test_a_block_that_is_computed_again_sees_the_number_its_forward_saw(
    family: str, way: bool
) -> None:
    model, adapter = deep(family, way)
    gt.activate(model, adapter.name, drop=gt.AdapterDrop(high=3))
    state = gt.state_of(model)
    seen: list[int] = []
    first_linear(stack(model)[3]).register_forward_hook(
        lambda *_: seen.append(state.active.current().drop)
    )
    torch.manual_seed(1)
    for _ in range(6):
        seen.clear()
        first = loss_of(model, family)
        loss_of(model, family)  # draws another number before the first pass goes backward
        first.backward()
        assert len(seen) == 3
        assert seen[2] == seen[0]


@pytest.mark.parametrize("way", [False, True])
def test_drawn_and_checkpointed_gradients_are_those_of_a_plain_pass(way: bool) -> None:
    grads: list[dict[str, Tensor | None]] = []
    for checkpoint in (None, way):
        model, adapter = deep("llama", checkpoint)
        gt.activate(model, adapter.name, drop=gt.AdapterDrop(high=3))
        torch.manual_seed(5)
        for _ in range(4):
            loss_of(model, "llama").backward()
        grads.append({n: t.grad for n, t in adapter.named_parameters()})
    for name, plain in grads[0].items():
        other = grads[1][name]
        assert (plain is None) == (other is None), name
        if plain is not None:
            torch.testing.assert_close(plain, other, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("drop", [5, gt.AdapterDrop(high=5), gt.AdapterDrop(rest=5)])
def test_more_than_there_are_is_refused(drop: Any) -> None:
    model, adapter = deep("bert", None)
    with pytest.raises(AdapterError, match="the lowest 5 blocks, but this model's stacks have 4"):
        gt.activate(model, adapter.name, drop=drop)
