"""EVA's start spans what HF PEFT's does on the same batches, and its ranks are PEFT's."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import graftune as gt
from tests.contract.subjects import logits
from tests.families import FAMILIES
from tests.methods.test_eva import cosines

peft = pytest.importorskip("peft", reason="parity is judged against HF PEFT itself")

TARGETS = {
    "bert": ["query", "key", "value", "intermediate.dense"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"],
    "t5": ["q", "k", "v", "o"],
}
RANK = 3


def stretched(family: str) -> Any:
    """Returns a model whose embeddings vary along few directions, as a trained model's do."""
    model: Any = FAMILIES[family].build()
    table = model.get_input_embeddings().weight
    fall = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(5)))[0]
    with torch.no_grad():
        table.copy_(table @ fall * 0.6 ** torch.arange(32) @ fall.t() * 10)
        for norm in gt.anatomy(model).norms[1::2]:  # along fewer still, so that ranks move
            model.get_submodule(norm).weight[0] *= 8
    return model


def batches(family: str) -> list[dict[str, Tensor]]:
    kind = FAMILIES[family]
    padding = None if kind.kind == "encoder-decoder" else "right"
    return [kind.inputs(batch=30, length=9, seed=seed, padding=padding) for seed in range(3)]


def theirs(family: str, rho: float, **settings: Any) -> tuple[Any, dict[str, Tensor]]:
    """Returns PEFT's model, and its A by module."""
    eva = peft.EvaConfig(rho=rho, tau=0.99, **settings)
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=6,
        target_modules=TARGETS[family],
        init_lora_weights="eva",
        eva_config=eva,
        fan_in_fan_out=family == "gpt2",
    )
    options: dict[str, Any] = {"show_progress_bar": False}
    if family == "t5":  # its default picks by a mask of the encoder's shape
        options |= {"prepare_model_inputs_fn": None, "prepare_layer_inputs_fn": None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(stretched(family), config)
        peft.initialize_lora_eva_weights(model, batches(family), **options)
    named = dict(model.named_parameters())
    ending = ".lora_A.default.weight"
    found = {n.removesuffix(ending): t for n, t in named.items() if n.endswith(ending)}
    return model, {n.removeprefix("base_model.model."): t.detach() for n, t in found.items()}


def ours(family: str, rho: float, **settings: Any) -> tuple[gt.Adapter, dict[str, Tensor]]:
    method = gt.LoRA(
        r=RANK, alpha=6, init="eva", eva_rho=rho, targets=tuple(TARGETS[family]), **settings
    )
    adapter = gt.attach(stretched(family), method, data=batches(family))
    tensors = adapter.state_dict()
    return adapter, {n.removesuffix(".A"): t for n, t in tensors.items() if n.endswith(".A")}


@pytest.mark.parametrize("family", TARGETS)
def test_both_start_along_the_same_directions(family: str) -> None:
    _, expected = theirs(family, rho=1.0)
    _, found = ours(family, rho=1.0)
    assert found.keys() == expected.keys()
    for name, A in found.items():
        assert cosines(A, expected[name]).min() > 0.99, name  # tau: how still both want them


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_ranks_and_scales_are_peft_s(family: str) -> None:
    model, expected = theirs(family, rho=2.0)
    adapter, found = ours(family, rho=2.0)
    ranks = {name: len(A) for name, A in found.items()}
    assert len(set(ranks.values())) > 1
    assert ranks == {name: len(A) for name, A in expected.items()}
    for name in ranks:
        layer: Any = model.get_submodule(f"base_model.model.{name}")
        assert layer.scaling["default"] == pytest.approx(adapter.method.scale(name))  # type: ignore[attr-defined]


def test_whitened_rows_are_as_long_as_peft_s() -> None:
    """Up to one factor, since PEFT leaves each module's
    look at the data when that one has settled, and whitens what query, key and value share
    once for each of them."""
    _, expected = theirs("bert", rho=1.0, whiten=True)
    _, found = ours("bert", rho=1.0, eva_whiten=True)
    for layer in range(2):
        name = f"bert.encoder.layer.{layer}.intermediate.dense"
        ratios = found[name].norm(dim=1) / expected[name].norm(dim=1)
        torch.testing.assert_close(ratios, ratios.mean().expand(RANK), rtol=0.05, atol=0)
        assert 0.8 < ratios.mean() < 1.25


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5"])
def test_peft_reads_what_it_saved_as_an_ordinary_lora(family: str, tmp_path: Path) -> None:
    adapter, _ = ours(family, rho=2.0)
    with torch.no_grad():
        for tensor in adapter.parameters():
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)))
    inputs = FAMILIES[family].inputs()
    expected = logits(adapter.model, inputs)
    loaded = peft.PeftModel.from_pretrained(
        stretched(family), str(adapter.save(tmp_path / "eva"))
    ).eval()
    assert loaded.peft_config["default"].init_lora_weights is True
    torch.testing.assert_close(logits(loaded, inputs), expected, atol=1e-5, rtol=1e-5)
