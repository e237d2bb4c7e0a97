"""Selective: which tensors train, that they are the base's, and what shares them follows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import graftune as gt
from graftune.errors import AdapterError, AnatomyError, SettingsError
from tests.contract.subjects import logits, scores, shake
from tests.families import FAMILIES


def attached(family: str, task: Any = "default", **settings: Any) -> tuple[Any, gt.Adapter]:
    model = FAMILIES[family].build(task)
    return model, gt.attach(model, gt.Selective(**settings), seed=0)


def trained(family: str, **settings: Any) -> list[str]:
    """Returns the tensors trained, without the head's."""
    _, adapter = attached(family, **settings)
    heads = tuple(f"{head}." for head in adapter.head_names) or ("\0",)
    return [n for n, _ in adapter.named_parameters() if not n.startswith(heads)]


def test_attention_is_the_default() -> None:
    found = trained("bert", layers=0)
    places = ("self.query", "self.key", "self.value", "output.dense")
    assert found == [
        f"bert.encoder.layer.0.attention.{place}.{kind}"
        for place in places
        for kind in ("weight", "bias")
    ]
    assert trained("bert", layers=0, exclude="biases") == found[::2]


def test_a_trained_tensor_takes_the_place_of_the_bases() -> None:
    model, adapter = attached("bert", targets="ffn")
    shake(adapter, seed=1)
    host = model.bert.encoder.layer[0].intermediate.dense
    own = dict(adapter.named_parameters())
    x = torch.randn(3, 32)
    weight, bias = (own[f"bert.encoder.layer.0.intermediate.dense.{n}"] for n in ("weight", "bias"))
    assert torch.equal(host(x), F.linear(x, weight, bias))
    assert not torch.equal(host(x), F.linear(x, host.weight, host.bias))


def test_it_is_full_fine_tuning_of_the_tensors_alone() -> None:
    ours, adapter = attached("gpt2", targets="blocks", layers=-1)
    plain = FAMILIES["gpt2"].build()
    names = [name for name, _ in adapter.named_parameters()]
    for name, tensor in plain.named_parameters():
        tensor.requires_grad_(name in names)
    for model, tensors in (
        (ours, list(adapter.parameters())),
        (plain, [plain.get_parameter(n) for n in names]),
    ):
        optimizer = torch.optim.AdamW(tensors, lr=1e-2)
        for _ in range(3):
            scores(model(**FAMILIES["gpt2"].inputs())).pow(2).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    for name, tensor in adapter.named_parameters():
        assert torch.equal(tensor, plain.get_parameter(name))


def test_training_it_learns() -> None:
    model, adapter = attached("bert", targets="blocks", layers=-1)
    inputs, labels = FAMILIES["bert"].inputs(batch=6), torch.arange(6) % 3
    optimizer = torch.optim.AdamW(list(adapter.parameters()), lr=1e-2)
    losses: list[float] = []
    for _ in range(30):
        loss = model(**inputs, labels=labels).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize(("family", "targets"), [("gpt2", "wte"), ("t5", "embeddings")])
def test_the_language_model_head_follows_tied_embeddings(
    family: str, targets: str, tmp_path: Path
) -> None:
    model, adapter = attached(family, targets=targets)
    assert len(adapter.state_dict()) == 1
    shake(adapter, seed=1)
    name, own = next(adapter.named_parameters())
    x = torch.randn(2, 32)
    assert torch.equal(model.lm_head(x), F.linear(x, own))
    expected = logits(model, FAMILIES[family].inputs())
    adapter.save(tmp_path / "a")
    fresh = FAMILIES[family].build()
    loaded = gt.load(fresh, tmp_path / "a")
    assert list(loaded.state_dict()) == [name]
    assert torch.equal(logits(fresh, FAMILIES[family].inputs()), expected)
    gt.merge(fresh, "a")
    assert fresh.lm_head.weight is fresh.get_parameter(name)
    torch.testing.assert_close(logits(fresh, FAMILIES[family].inputs()), expected)


def test_rows_mix_embeddings_of_tokens_with_the_head_tied_to_them() -> None:
    model = FAMILIES["gpt2"].build()
    inputs = FAMILIES["gpt2"].inputs(batch=3)
    for seed, name in enumerate("ab"):
        shake(gt.attach(model, gt.Selective(targets="wte"), name), seed)
    with gt.using(model, gt.Rows(["a", None, "b"])):
        mixed = logits(model, inputs)
    for row, name in enumerate(("a", None, "b")):
        with gt.using(model, name):
            torch.testing.assert_close(mixed[row], logits(model, inputs)[row])


@pytest.mark.parametrize(
    ("family", "targets", "words"),
    [
        ("gpt2", "embeddings", r"transformer\.wpe, which runs once for all rows"),
        ("t5", "attention", "relative_attention_bias, which runs once"),
    ],
)
def test_rows_cant_mix_what_sees_positions(family: str, targets: str, words: str) -> None:
    model, _ = attached(family, targets=targets)
    with pytest.raises(AdapterError, match=words):
        gt.activate(model, gt.Rows(["default", None]))


def test_the_head_alone_is_a_linear_probe(tmp_path: Path) -> None:
    model, adapter = attached("bert", targets="head")
    names = ["classifier.weight", "classifier.bias"]
    assert [name for name, _ in adapter.named_parameters()] == names
    assert adapter.method.count(model, gt.anatomy(FAMILIES["bert"].build())) == 0
    inputs = FAMILIES["bert"].inputs()
    output = model(**inputs, output_hidden_states=True)
    assert not any(state.requires_grad for state in output.hidden_states)
    shake(adapter, seed=1)
    adapter.save(tmp_path / "probe")
    fresh = FAMILIES["bert"].build()
    gt.load(fresh, tmp_path / "probe")
    assert torch.equal(logits(fresh, inputs), logits(model, inputs))


def test_a_pretrained_head_can_be_trained_too() -> None:
    model = FAMILIES["llama"].build()
    adapter = gt.attach(model, gt.Selective(targets=["lm_head", "layers.1.mlp"]))
    assert [n for n, _ in adapter.named_parameters()][-1] == "lm_head.weight"
    assert len(adapter.grafts) == 4


def test_a_second_selection_adds_its_difference() -> None:
    model = FAMILIES["bert"].build()
    own: dict[str, torch.Tensor] = {}
    key = "bert.encoder.layer.0.intermediate.dense.weight"
    for seed, name in enumerate("ab"):
        adapter = gt.attach(model, gt.Selective(targets="ffn", train_head=False), name)
        shake(adapter, seed)
        own[name] = adapter.state_dict()[key]
    host = model.get_submodule("bert.encoder.layer.0.intermediate.dense")
    x = torch.randn(3, 32)
    with gt.using(model, gt.Stack("a", "b")):
        found = host(x)
    both = own["a"] + own["b"] - host.weight
    biases = [gt.adapters(model)[n].state_dict()[key.replace("weight", "bias")] for n in "ab"]
    torch.testing.assert_close(found, F.linear(x, both, biases[0] + biases[1] - host.bias))


@pytest.mark.parametrize(
    ("family", "settings", "error", "words"),
    [
        ("bert", {"targets": "atention"}, AnatomyError, 'Did you mean "attention"'),
        ("bert", {"targets": "cross-attention"}, AnatomyError, "this bert has none"),
        ("t5", {"targets": "biases"}, AnatomyError, "this t5 has none"),
        ("gpt2", {"targets": "query"}, AnatomyError, "a tensor is trained whole"),
        ("gpt2", {"targets": "head"}, AnatomyError, r"tied to transformer\.wte\.weight"),
        ("bert", {"layers": 9}, AnatomyError, "Layer 9 is out of range"),
        ("bert", {"exclude": "attention"}, AnatomyError, "leave no tensor"),
        ("bert", {"targets": 3}, SettingsError, "targets is 3"),
    ],
)
def test_what_names_nothing_is_refused(
    family: str, settings: dict[str, Any], error: type[Exception], words: str
) -> None:
    model = FAMILIES[family].build()
    with pytest.raises(error, match=words):
        gt.attach(model, gt.Selective(**settings))
    assert gt.adapters(model) == {}
