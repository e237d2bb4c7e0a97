"""LayerNorm tuning: which norms, which of their tensors, and what they compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import graftune as gt
from graftune.errors import AnatomyError, SettingsError
from tests.contract.subjects import scores, shake
from tests.families import FAMILIES


def names(family: str, **settings: Any) -> list[str]:
    """Returns the tensors trained, without the head's."""
    adapter = gt.attach(FAMILIES[family].build(), gt.LayerNormTuning(**settings))
    heads = tuple(f"{head}." for head in adapter.head_names) or ("\0",)
    return [n for n, _ in adapter.named_parameters() if not n.startswith(heads)]


def test_all_are_the_weights_and_biases_of_every_norm_of_the_body() -> None:
    model = FAMILIES["bert"].build()
    expected = [n for n, _ in model.bert.named_parameters(prefix="bert") if "LayerNorm" in n]
    assert names("bert") == expected
    assert len(expected) == 10


def test_norms_inside_attention_are_among_them() -> None:
    assert sum(".q_norm." in name for name in names("qwen3")) == 2


def test_which_and_layers_choose_among_them() -> None:
    assert names("bert", which="weight", layers=-1) == [
        "bert.encoder.layer.1.attention.output.LayerNorm.weight",
        "bert.encoder.layer.1.output.LayerNorm.weight",
    ]
    assert all(name.endswith(".bias") for name in names("gpt2", which="bias"))
    assert names("gpt2", targets=["ln_f"]) == ["transformer.ln_f.weight", "transformer.ln_f.bias"]
    assert len(names("llama", targets=r".*input_layernorm\..*")) == 2


def test_a_trained_layer_norm_computes_the_formula() -> None:
    model: Any = FAMILIES["bert"].build()
    shake(gt.attach(model, gt.LayerNormTuning()), seed=1)
    host = model.bert.embeddings.LayerNorm
    x = torch.randn(2, 3, 32)
    own = gt.adapters(model)["default"].state_dict()
    gamma, beta = (own[f"bert.embeddings.LayerNorm.{n}"] for n in ("weight", "bias"))
    centred = x - x.mean(-1, keepdim=True)
    std = (centred.pow(2).mean(-1, keepdim=True) + host.eps).sqrt()
    torch.testing.assert_close(host(x), gamma * centred / std + beta)


def test_a_trained_rms_norm_computes_the_formula() -> None:
    model: Any = FAMILIES["llama"].build()
    adapter = gt.attach(model, gt.LayerNormTuning(layers=0))
    shake(adapter, seed=1)
    host = model.model.layers[0].input_layernorm
    x = torch.randn(2, 3, 32)
    gamma = adapter.state_dict()["model.layers.0.input_layernorm.weight"]
    rms = (x.pow(2).mean(-1, keepdim=True) + host.variance_epsilon).sqrt()
    torch.testing.assert_close(host(x), gamma * x / rms)


def test_every_norm_gets_a_gradient_and_learns() -> None:
    model = FAMILIES["llama"].build()
    adapter = gt.attach(model, gt.LayerNormTuning())
    optimizer = torch.optim.AdamW(list(adapter.parameters()), lr=1e-1)
    losses: list[float] = []
    for _ in range(20):
        loss = scores(model(**FAMILIES["llama"].inputs())).pow(2).mean()
        loss.backward()
        losses.append(loss.item())
        assert all(t.grad is not None and t.grad.any() for t in adapter.parameters())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"which": "gamma"}, SettingsError, "which is 'gamma', expected one of all, weight, bias"),
        ({"which": "bias"}, SettingsError, 'none of the 5 tensors.*take which="all"'),
        ({"targets": "attention"}, SettingsError, r'take Selective\(targets="attention"\)'),
        ({"targets": "nrom"}, AnatomyError, 'Did you mean "norm'),
        ({"layers": 5}, AnatomyError, "Layer 5 is out of range"),
    ],
)
def test_what_names_nothing_is_refused(
    settings: dict[str, Any], error: type[Exception], words: str
) -> None:
    model = FAMILIES["llama"].build()
    with pytest.raises(error, match=words):
        gt.attach(model, gt.LayerNormTuning(**settings))
    assert gt.adapters(model) == {}
