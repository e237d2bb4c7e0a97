"""Parallel: each member's rows are what it answers alone, and what lies below runs once."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import graftune as gt
from graftune.errors import AdapterError
from tests.contract.subjects import logits, shake
from tests.families import FAMILIES, Family

CASES = [(f, t) for f, family in FAMILIES.items() for t in family.tasks if f != "clip"]


def build(name: str, task: Any = "default", **members: gt.LoRA) -> tuple[nn.Module, Any, Family]:
    family = FAMILIES[name]
    model = family.build(task)
    parts = gt.anatomy(model)
    layers = (1,) if len(parts.stacks) == 1 else None
    methods = members or {
        "a": gt.PfeifferAdapter(reduction=8, layers=layers),
        "b": gt.LoRA(r=4, layers=layers),
    }
    for seed, (key, method) in enumerate(methods.items()):
        shake(gt.attach(model, method, key, seed=seed), seed)
    fixed = family.kind == "vision" or name == "whisper"
    return model, family.inputs(3, padding=None if fixed else "right", task=task), family


@pytest.mark.parametrize(("name", "task"), CASES)
def test_each_member_answers_as_it_does_alone(name: str, task: Any) -> None:
    model, inputs, _ = build(name, task)
    alone = []
    for member in ("a", "b", None):
        with gt.using(model, member):
            alone.append(logits(model, inputs))
    with gt.using(model, gt.Parallel("a", "b", None)):
        out = logits(model, inputs)
    scale = max(1.0, out.abs().max().item())
    for rows, expected in zip(out.chunk(3), alone, strict=True):
        assert torch.allclose(rows, expected, atol=1e-5 * scale)


@pytest.mark.parametrize(("name", "task"), CASES)
def test_the_loss_is_the_mean_of_the_members(name: str, task: Any) -> None:
    model, inputs, family = build(name, task)
    labelled = {**inputs, **family.labels(model, inputs)}
    losses = []
    for member in ("a", "b"):
        with gt.using(model, member):
            losses.append(model(**labelled).loss)
    with gt.using(model, gt.Parallel("a", "b")):
        assert torch.allclose(model(**labelled).loss, torch.stack(losses).mean(), atol=1e-5)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "deberta-v2", "vit", "swin", "bloom"])
def test_blocks_below_the_adapters_see_the_rows_once(name: str) -> None:
    model, inputs, _ = build(name)
    rows: list[int] = []
    for block in gt.anatomy(model).blocks:
        model.get_submodule(block.path).register_forward_hook(
            lambda _m, _a, out: rows.append(
                (out if isinstance(out, torch.Tensor) else out[0]).shape[0]
            )
        )
    gt.activate(model, gt.Parallel("a", "b"))
    logits(model, inputs)
    assert rows[0] == 3
    assert rows[-1] == 6


def test_dropped_blocks_run_once_too() -> None:
    model, inputs, _ = build("bert", a=gt.PfeifferAdapter(), b=gt.PfeifferAdapter())
    rows: list[int] = []
    block = gt.anatomy(model).blocks[0].path
    model.get_submodule(block).register_forward_hook(
        lambda _m, _a, out: rows.append((out if isinstance(out, torch.Tensor) else out[0]).shape[0])
    )
    expected = []
    for member in ("a", "b"):
        with gt.using(model, member, drop=1):
            expected.append(logits(model, inputs))
    with gt.using(model, gt.Parallel("a", "b"), drop=1):
        out = logits(model, inputs)
    assert rows[-1] == 3
    assert torch.allclose(out, torch.cat(expected), atol=1e-6)
    with gt.using(model, gt.Parallel("a", "b")):
        logits(model, inputs)
    assert rows[-1] == 6


@pytest.mark.parametrize("method", [gt.LoRA(r=2, targets="embeddings"), gt.BitFit()])
def test_an_adapter_below_the_blocks_copies_the_inputs(method: Any) -> None:
    model, inputs, _ = build("bert", a=method, b=gt.PfeifferAdapter())
    alone = []
    for member in ("a", "b"):
        with gt.using(model, member):
            alone.append(logits(model, inputs))
    with gt.using(model, gt.Parallel("a", "b")):
        assert torch.allclose(logits(model, inputs), torch.cat(alone), atol=1e-6)


def test_a_stack_may_end_in_a_parallel() -> None:
    model, inputs, _ = build("llama", low=gt.LoRA(r=2), a=gt.PfeifferAdapter(), b=gt.LoRA(r=2))
    alone = []
    for member in ("a", "b"):
        with gt.using(model, gt.Stack("low", member)):
            alone.append(logits(model, inputs))
    with gt.using(model, gt.Stack("low", gt.Parallel("a", "b"))):
        assert torch.allclose(logits(model, inputs), torch.cat(alone), atol=1e-5)


def test_gradients_are_those_of_both() -> None:
    model, inputs, family = build("bert")
    labelled = {**inputs, **family.labels(model, inputs)}
    found: list[dict[str, torch.Tensor]] = []
    for composition in ("a", gt.Parallel("a", "b")):
        gt.activate(model, composition)
        model.zero_grad()
        model(**labelled).loss.backward()
        adapter = gt.adapters(model)["a"]
        found.append(
            {n: p.grad.clone() for n, p in adapter.named_parameters() if p.grad is not None}
        )
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        assert torch.allclose(found[1][name] * 2, gradient, atol=1e-6)


def test_checkpointing_changes_nothing() -> None:
    found = []
    for checkpointed in (False, True):
        model, inputs, family = build("llama")
        gt.activate(model, gt.Parallel("a", "b"))
        model.train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        model(**inputs, **family.labels(model, inputs)).loss.backward()
        found.append([p.grad for p in gt.adapters(model)["a"].parameters()])
    for one, two in zip(*found, strict=True):
        assert torch.allclose(one, two, atol=1e-6)


def test_copies_and_pickles_of_a_model_copy_too() -> None:
    model, inputs, _ = build("bert")
    gt.activate(model, gt.Parallel("a", "b"))
    expected = logits(model, inputs)
    assert torch.equal(logits(copy.deepcopy(model), inputs), expected)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model)), inputs), expected)


def test_nothing_is_left_once_all_are_detached() -> None:
    model, inputs, _ = build("bert")
    with gt.using(model, gt.Parallel("a", "b")):
        logits(model, inputs)
    gt.activate(model, None)
    gt.detach(model, "a")
    gt.detach(model, "b")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_part_of_the_model_alone_is_refused() -> None:
    model, inputs, _ = build("t5")
    gt.activate(model, gt.Parallel("a", "b"))
    with pytest.raises(
        AdapterError, match="Parallel copies the rows in a forward pass of the whole"
    ):
        model.encoder(input_ids=inputs["input_ids"])  # type: ignore[operator]


def test_what_changes_whole_weights_is_refused() -> None:
    model, _, _ = build("bert", a=gt.DiffPruning(keep=0.1), b=gt.LoRA(r=2))
    with pytest.raises(AdapterError, match="can't act on some rows of a batch only"):
        gt.activate(model, gt.Parallel("a", "b"))
