"""Nothing below the lowest trained block is part of the backward pass, checkpointed or not."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graftune as gt
from graftune.methods.base import Method
from graftune.training import training_args
from tests.contract.subjects import scores, shake
from tests.families import FAMILIES
from tests.training.models import examples, tiny

WAYS = (None, False, True)
"""Not checkpointed, checkpointed without and with torch's reentrant form."""
TOP: dict[str, Method] = {
    "lora": gt.LoRA(r=2, layers=-1),
    "bitfit": gt.BitFit(layers=-1, add_missing=True),
}


def subject(
    family: str, method: Method, way: bool | None, **options: Any
) -> tuple[Any, gt.Adapter]:
    """Returns a model of two or more blocks in training, with a shaken adapter."""
    model = FAMILIES[family].build(**options).train()
    adapter = gt.attach(model, method, seed=0)
    shake(adapter, seed=1)
    checkpointed(model, way)
    return model, adapter


def checkpointed(model: Any, way: bool | None) -> None:
    if way is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            model.gradient_checkpointing_enable({"use_reentrant": way})


def loss_of(model: nn.Module, family: str) -> Tensor:
    return scores(model(**FAMILIES[family].inputs())).float().pow(2).mean()


@contextlib.contextmanager
def seen_by(block: nn.Module) -> Iterator[list[Tensor]]:
    """Collects the hidden states that enter a block."""
    found: list[Tensor] = []

    def look(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        given = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
        found.append(next(value for value in given if value.is_floating_point()))

    handle = block.register_forward_pre_hook(look, with_kwargs=True)
    yield found
    handle.remove()


def saved_bytes(model: nn.Module, family: str) -> int:
    """Returns the bytes that one forward pass keeps for the backward, each storage once."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss_of(model, family)
    return sum(kept.values())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", TOP)
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "mixtral", "t5", "bart", "vit"])
def test_what_enters_the_lowest_trained_block_has_no_gradient(
    family: str, method: str, way: bool | None
) -> None:
    model, adapter = subject(family, TOP[method], way)
    top = model.get_submodule(gt.state_of(model).anatomy.blocks[-1].path)
    with seen_by(top) as entering, warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # torch's, of checkpoints that lose gradients
        loss = loss_of(model, family)
    assert [(x.requires_grad, x.grad_fn) for x in entering] == [(False, None)]
    loss.backward()
    got = {n: t.grad for n, t in adapter.named_parameters()}
    plain, other = subject(family, TOP[method], None)
    loss_of(plain, family).backward()
    for name, tensor in other.named_parameters():
        zeros = torch.zeros_like(tensor)
        left, right = (zeros if g is None else g for g in (got[name], tensor.grad))
        torch.testing.assert_close(left, right, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_fewer_blocks_keep_less_for_the_backward_pass(family: str, way: bool | None) -> None:
    kept: list[int] = []
    for layers in (None, -1):
        model, _ = subject(family, gt.LoRA(r=2, layers=layers), way, num_hidden_layers=8)
        kept.append(saved_bytes(model, family))
    every, top = kept
    assert top < (0.3 if way is None else 0.75) * every


@pytest.mark.parametrize("way", [False, True])
def test_checkpoints_below_the_cut_are_not_taken(way: bool) -> None:
    model, _ = subject("llama", gt.LoRA(r=2, layers=-1), way)
    runs: list[int] = []
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.register_forward_pre_hook(lambda *_, n=number: runs.append(n))
    loss_of(model, "llama").backward()
    assert runs == [0, 1, 1]  # the last again in the backward pass
    assert all(layer.gradient_checkpointing for layer in model.model.layers)


@pytest.mark.parametrize("way", [False, True])
def test_gradients_reach_embeddings_that_train(way: bool) -> None:
    model, adapter = subject("llama", gt.LoRA(r=2, targets=["embeddings", "q_proj"]), way)
    loss_of(model, "llama").backward()
    assert all(t.grad is not None and t.grad.abs().sum() > 0 for t in adapter.parameters())


def test_checkpoints_of_a_models_own_keep_the_gradients_they_ask_for() -> None:
    model, _ = subject("llama", gt.LoRA(r=2, layers=-1), None)
    model.enable_input_require_grads()  # type: ignore[operator]
    with seen_by(model.model.layers[-1]) as entering:
        loss_of(model, "llama")
    assert entering[0].requires_grad


@pytest.mark.parametrize("way", WAYS)
def test_the_trainer_keeps_the_cut(way: bool | None, tmp_path: Any) -> None:
    model = tiny(dropout=0.0)
    gt.attach(model, gt.LoRA(r=2, layers=-1), seed=0)
    settings: dict[str, Any] = {"activation_checkpointing": way is not None}
    if way is not None:
        settings["activation_checkpointing_kwargs"] = {"use_reentrant": way}
    args = training_args(tmp_path, max_steps=2, use_cpu=True, disable_tqdm=True, **settings)
    run = gt.Trainer(model=model, args=args, train_dataset=examples())
    with seen_by(model.bert.encoder.layer[-1]) as entering:
        run.train()
    assert len(entering) == 2
    assert not any(x.requires_grad for x in entering)
    assert any(layer.gradient_checkpointing for layer in model.bert.encoder.layer) == (
        way is not None
    )
