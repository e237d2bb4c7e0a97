"""FISH mask: the Fisher information of the data, and the entries that it chooses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import graftune as gt
from graftune.errors import SettingsError
from graftune.methods._sparse import SparseChange
from graftune.training.lengths import PadToLongest
from tests.contract.subjects import logits, shake, tensors
from tests.families import FAMILIES, LABELS
from tests.training.models import examples, tiny

INPUTS = FAMILIES["bert"].inputs()


def data(count: int = 6, size: int = 4) -> list[dict[str, Any]]:
    rows, collate = examples(count), PadToLongest(0)
    return [dict(collate(rows[at : at + size])) for at in range(0, count, size)]


def chosen(adapter: Any) -> dict[str, list[int]]:
    """Returns the positions trained in each tensor."""
    deltas = {g.place.key: g.delta for g in adapter.grafts if isinstance(g.delta, SparseChange)}
    return {name: delta.positions().tolist() for name, delta in deltas.items()}


def one_by_one(model: Any, rows: list[dict[str, Any]], names: list[str]) -> dict[str, Tensor]:
    """Returns the sums of squares of the gradients of single, unpadded examples."""
    model.eval()
    found = {name: torch.zeros_like(model.get_parameter(name)) for name in names}
    for row in rows:
        model.zero_grad()
        model(
            input_ids=torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]])
        ).loss.backward()
        for name in names:
            gradient = model.get_parameter(name).grad
            found[name] += 0 if gradient is None else gradient.square()
    model.zero_grad()
    return found


@pytest.mark.parametrize("samples", [6, 5, 100])
def test_the_entries_are_those_of_the_largest_information_of_single_examples(samples: int) -> None:
    model = tiny()
    names = [name for name, _ in model.named_parameters() if not name.startswith("classifier")]
    found = one_by_one(model, examples(6)[:samples], names)
    flat = torch.cat([found[name].flatten() for name in names])
    count = len(flat) // 50
    least = flat.topk(count).values[-1].item()
    adapter = gt.attach(model, gt.FishMask(keep=0.02, samples=samples), data=data())
    at = chosen(adapter)
    assert sum(map(len, at.values())) == count
    values = torch.cat([found[name].flatten()[at[name]] for name in at])
    assert values.min().item() >= least * (1 - 1e-4)
    assert not any(name.startswith("classifier") for name in at)


def test_the_data_leave_the_model_as_it_was() -> None:
    model = tiny().train()
    model.bert.pooler.eval()
    model.bert.pooler.dense.weight.requires_grad_(False)
    before = tensors(model)
    adapter = gt.attach(model, gt.FishMask(keep=0.02), data=data())
    assert model.training
    assert not model.bert.pooler.training
    assert all(p.grad is None for p in model.parameters())
    trained = {id(p) for p in adapter.parameters()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == trained
    assert all(torch.equal(before[name], tensor) for name, tensor in tensors(model).items())
    gt.activate(model, None)
    gt.detach(model, "default")
    assert not model.bert.pooler.dense.weight.requires_grad
    assert model.bert.embeddings.word_embeddings.weight.requires_grad


def test_another_adapter_is_not_looked_at() -> None:
    alone = chosen(gt.attach(tiny(), gt.FishMask(keep=0.02), data=data()))
    model = tiny()
    shake(gt.attach(model, gt.LoRA(r=2), "first"), seed=3)
    assert chosen(gt.attach(model, gt.FishMask(keep=0.02), data=data())) == alone


def test_it_starts_as_the_base_and_moves_its_entries_alone() -> None:
    model = tiny(dropout=0.0)
    base = logits(model, INPUTS)
    adapter = gt.attach(model, gt.FishMask(keep=0.02, train_head=False), data=data(), seed=0)
    assert torch.equal(logits(model, INPUTS), base)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=5e-2, weight_decay=0.1)
    model.train()
    (batch, *_), losses = data(8, 8), list[float]()
    for _ in range(20):
        optimizer.zero_grad()
        loss = model(**batch).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
    before, at = tensors(model), chosen(adapter)
    gt.merge(model, "default")
    for name, tensor in tensors(model).items():
        moved = (tensor != before[name]).flatten().nonzero().flatten().tolist()
        assert set(moved) <= set(at.get(name, []))


def test_sampled_labels_are_the_models_own() -> None:
    """A model that is sure answers alike whatever labels the data have."""
    model = tiny()
    with torch.no_grad():
        model.classifier.bias.copy_(torch.tensor([50.0] + [0.0] * (LABELS - 1)))
    method = gt.FishMask(keep=0.02, fisher="sampled")
    surely = [{**batch, "labels": torch.zeros_like(batch["labels"])} for batch in data()]
    expected = chosen(gt.attach(model, gt.FishMask(keep=0.02), "a", data=surely))
    assert chosen(gt.attach(model, method, "b", data=data(), seed=0)) == expected


def test_sampled_labels_need_a_classifier() -> None:
    family = FAMILIES["llama"]
    model, inputs = family.build(), family.inputs()
    batch = {**inputs, **family.labels(model, inputs)}
    with pytest.raises(SettingsError, match=r"one label per row, found labels of shape \(7,\)"):
        gt.attach(model, gt.FishMask(keep=0.02, fisher="sampled"), data=[batch])
    assert gt.adapters(model) == {}
    assert all(p.requires_grad for p in model.parameters())


def test_data_are_needed_and_must_give_a_finite_loss() -> None:
    model, method = tiny(), gt.FishMask(keep=0.02)
    with pytest.raises(SettingsError, match=r"looks at data before it trains: pass batches"):
        gt.attach(model, method)
    with pytest.raises(SettingsError, match=r"returned no loss.*add labels"):
        gt.attach(model, method, data=[INPUTS])
    with pytest.raises(SettingsError, match="data holds no batch"):
        gt.attach(model, method, data=iter([]))
    with torch.no_grad():
        model.classifier.weight[0, 0] = float("nan")
    with pytest.raises(SettingsError, match="the loss of an example is nan"):
        gt.attach(model, method, data=data())


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"keep": 0.0}, "keep is 0.0, expected more than 0"),
        ({"keep": -0.1}, "keep is -0.1, expected between 0 and 1"),
        ({"samples": 0}, "samples is 0, expected at least 1"),
        ({"fisher": "true"}, "fisher is 'true', expected one of empirical, sampled"),
    ],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        gt.FishMask(**wrong)
