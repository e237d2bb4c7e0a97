"""Gradient checkpointing under every method: the same gradients, only where something trains."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import graftune as gt
from graftune.methods.base import Method
from graftune.training.chunked_loss import chunked_loss
from tests.contract.subjects import STEPS, shake
from tests.families import FAMILIES
from tests.methods.test_base import MADE
from tests.training.runs import args

SETTINGS: dict[str, dict[str, Any]] = {
    "LoRA": {"dropout": 0.3},
    "AdaLoRA": {"r": 4, "target_r": 2},
    "SAID": {"d": 200},
    "AdapterPlus": {"reduction": 8},
    "BitFit": {"add_missing": True},
    "DiffPruning": {"keep": 0.05},
    "FishMask": {"keep": 0.05},
    "LLaMAAdapter": {"length": 3, "layers": ":"},
    "LadderSideTuning": {"reduction": 2, "init": "random"},
    "PTuning": {"length": 3, "hidden": 8},
    "PrefixTuning": {"length": 3, "hidden": 8, "dropout": 0.2},
    "PTuningV2": {"length": 3},
    "PromptTuning": {"length": 3},
    "MultitaskPromptTuning": {"length": 3},
    "Compacter": {"bottleneck": 4},
    "CompacterPlusPlus": {"bottleneck": 4},
    "MAM": {"length": 3, "hidden": 8, "bottleneck": 4},
    "UniPELT": {"length": 3, "hidden": 8, "bottleneck": 4, "r": 2},
    "UnifiedAdapter": {"k": 3},
    "Union": {"methods": (gt.LoRA(r=2), gt.IA3(targets=()))},
    "AdapterFusion": {"members": ("a", "b")},
}
"""What a method needs besides its defaults to fit the tiny model; with dropout in some."""


def attached(name: str, family: str, **settings: Any) -> tuple[Any, dict[str, Tensor], gt.Adapter]:
    """Returns a language model in training under a method off its start, and a batch."""
    model, inputs = FAMILIES[family].build(), FAMILIES[family].inputs(padding="right")
    batch = {**inputs, **FAMILIES[family].labels(model, inputs)}
    method: Method = gt.methods()[name](**SETTINGS.get(name, {}) | settings)
    for number, member in enumerate(method.fuses):
        shake(gt.attach(model, gt.PfeifferAdapter(bottleneck=4), member, seed=number), number)
    data = [batch] if method.needs_data else None
    adapter = gt.attach(model, method, "task", seed=1, data=data)
    if method.needs_steps(adapter):
        adapter.begin(STEPS)
    shake(adapter, seed=1)
    return model.train(), batch, adapter


def gradients(model: Any, batch: dict[str, Tensor], adapter: gt.Adapter) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model(**batch).loss.backward()
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in
             adapter.named_parameters()}  # fmt: skip
    model.zero_grad(set_to_none=True)
    return found


@functools.cache
def plain(name: str, family: str) -> dict[str, Tensor]:
    return gradients(*attached(name, family))


@pytest.mark.parametrize("name", list(MADE))
@pytest.mark.parametrize(
    ("family", "way"),
    [
        ("llama", "reentrant"),
        ("llama", "not reentrant"),
        ("t5", "with the loss in pieces"),
        pytest.param("t5", "reentrant", marks=pytest.mark.slow),
        pytest.param("llama", "with the loss in pieces", marks=pytest.mark.slow),
    ],
)
def test_gradients_are_those_without_checkpoints(name: str, family: str, way: str) -> None:
    model, batch, adapter = attached(name, family)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable({"use_reentrant": way == "reentrant"})
    if way == "with the loss in pieces":
        with chunked_loss(model, 4):
            found = gradients(model, batch, adapter)
    else:
        found = gradients(model, batch, adapter)
    expected = plain(name, family)
    assert any(bool(tensor.any()) for tensor in expected.values())
    for key, gradient in found.items():
        torch.testing.assert_close(gradient, expected[key], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "settings", "again"),
    [
        *((name, {}, [0, 1]) for name in ("LoRA", "FullFineTuning", "PromptTuning", "Selective")),
        *((n, {"layers": 1}, [1]) for n in ("LoRA", "IA3", "PrefixTuning", "HoulsbyAdapter")),
        *((n, {"layers": 1}, [1]) for n in ("UniPELT", "SAID", "LayerNormTuning", "VeRA")),
        ("LadderSideTuning", {}, []),
    ],
)
def test_no_block_below_the_lowest_that_trains_is_computed_twice(
    name: str, settings: dict[str, Any], again: list[int]
) -> None:
    model, batch, _ = attached(name, "llama", **settings)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    runs: list[int] = []
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.register_forward_pre_hook(lambda *_, n=number: runs.append(n))
    model(**batch).loss.backward()
    assert sorted(runs) == sorted([0, 1, *again])


def rows() -> list[dict[str, Any]]:
    draw = torch.Generator().manual_seed(0)
    found = [torch.randint(5, 98, (8,), generator=draw).tolist() for _ in range(8)]
    return [{"input_ids": ids, "labels": ids} for ids in found]


@pytest.mark.parametrize("name", ["LoRA", "PrefixTuning", "PromptTuning", "LadderSideTuning"])
def test_the_trainers_own_switch_gives_the_same_weights(name: str, tmp_path: Path) -> None:
    found: list[dict[str, Tensor]] = []
    for checkpointed in (False, True):
        model, _, adapter = attached(name, "llama")
        chosen = args(
            tmp_path,
            max_steps=2,
            save_strategy="no",
            gradient_checkpointing=checkpointed,
        )
        gt.Trainer(model, chosen, train_dataset=rows()).train()
        assert any(m.gradient_checkpointing for m in model.model.layers) == checkpointed
        found.append({k: v.clone() for k, v in adapter.state_dict().items()})
    for key, tensor in found[0].items():
        torch.testing.assert_close(found[1][key], tensor, atol=1e-5, rtol=1e-4)
