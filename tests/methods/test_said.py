"""SAID against the plain equation, its counts, its file and its refusals."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import graftune as gt
from graftune.errors import AdapterError, AnatomyError, SettingsError
from graftune.kernels.fastfood import Fastfood
from tests.contract.subjects import logits
from tests.families import FAMILIES

BERT = FAMILIES["bert"]


def moved(model: Any, **settings: Any) -> gt.Adapter:
    """Attaches SAID and moves it off its start."""
    adapter = gt.attach(model, gt.SAID(**({"d": 100} | settings)), name="task")
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in adapter.parameters():
            tensor.add_(torch.randn(tensor.shape, generator=draw))
    return adapter


@pytest.mark.parametrize("aware", [True, False])
def test_every_tensor_is_its_own_and_the_projected_vector(aware: bool) -> None:
    base, model = BERT.build(), BERT.build()
    adapter = moved(model, structure_aware=aware, seed=5)
    own = adapter.state_dict()
    with torch.no_grad():
        heads = {f"{h}.{n}" for h in gt.anatomy(base).heads
                 for n, _ in base.get_submodule(h).named_parameters()}  # fmt: skip
        names = [name for name, _ in base.named_parameters() if name not in heads]
        assert len(adapter.grafts) == len(names) + 2  # and the head's weight and bias
        for at, name in enumerate(names):
            tensor = base.get_parameter(name)
            width = own["intrinsic"].numel()
            M = Fastfood(width, tensor.numel(), 5 + at, tensor.device)
            change = M(own["intrinsic"]).reshape(tensor.shape)
            tensor.add_(own[f"{name}.lam"] * change if aware else change)
        for name in heads:
            base.get_parameter(name).copy_(own[name])
        expected = logits(base, BERT.inputs())
    torch.testing.assert_close(logits(model, BERT.inputs()), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("aware", [True, False])
def test_d_numbers_are_trained_and_stored(aware: bool, tmp_path: Path) -> None:
    model = FAMILIES["llama"].build()
    adapter = moved(model, d=300, structure_aware=aware)
    tensors = len(adapter.grafts)
    assert adapter.count() == 300
    assert gt.summary(model).trainable == 300
    assert adapter.state_dict()["intrinsic"].numel() == 300 - (tensors if aware else 0)
    adapter.save(tmp_path / "a")
    stored = safetensors.torch.load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert sum(t.numel() for t in stored.values()) == 300
    assert gt.summary(model).changed == gt.summary(model).base


def test_the_scales_learn_once_the_vector_has_moved() -> None:
    model = BERT.build()
    adapter = gt.attach(model, gt.SAID(d=100, train_head=False), name="task")
    before = logits(BERT.build(), BERT.inputs())
    assert torch.equal(logits(model, BERT.inputs()), before)
    optimizer = torch.optim.SGD(list(adapter.parameters()), lr=1.0)
    scales = [g.delta.lam for g in adapter.grafts]
    for step in range(2):
        optimizer.zero_grad()
        model(**BERT.inputs()).logits.square().mean().backward()
        learnt = sum(float(lam.grad.abs()) for lam in scales if lam.grad is not None)
        assert (learnt > 0) == (step > 0)
        optimizer.step()


def test_it_learns() -> None:
    model, inputs = BERT.build(), BERT.inputs(batch=6)
    adapter = gt.attach(model, gt.SAID(d=200, train_head=False), name="task")
    labels = torch.arange(6) % 3
    optimizer = torch.optim.Adam(list(adapter.parameters()), lr=0.05)
    losses = []
    for _ in range(100):
        loss = model(**inputs, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_a_new_process_draws_the_same_projection(tmp_path: Path) -> None:
    model = BERT.build()
    moved(model, seed=3).save(tmp_path / "a")
    torch.save(logits(model, BERT.inputs()), tmp_path / "expected.pt")
    code = (
        "import sys, torch, graftune as gt\n"
        "from tests.families import FAMILIES\n"
        "family = FAMILIES['bert']\n"
        "model = family.build()\n"
        "gt.load(model, sys.argv[1] + '/a')\n"
        "expected = torch.load(sys.argv[1] + '/expected.pt', weights_only=True)\n"
        "with torch.no_grad():\n"
        "    assert torch.equal(model(**family.inputs()).logits, expected)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


def test_chosen_tensors_alone_are_moved() -> None:
    model = BERT.build()
    adapter = gt.attach(model, gt.SAID(d=40, targets="norms", layers=0), name="task")
    places = {g.place.key for g in adapter.grafts if not g.place.module.startswith("classifier")}
    assert len(places) == 4
    assert all("encoder.layer.0" in name and "LayerNorm" in name for name in places)


def test_a_tied_tensor_is_moved_once() -> None:
    model = FAMILIES["gpt2"].build()
    adapter = moved(model)
    names = [g.place.key for g in adapter.grafts]
    assert "lm_head.weight" not in names
    assert "transformer.wte.weight" in names
    gt.merge(model, "task")
    assert model.lm_head.weight is model.transformer.wte.weight


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"d": 10**9}, r"d is 1,000,000,000, but the targets have only [\d,]+ parameters"),
        ({"d": 20}, r"d is 20, of which the \d+ tensors' own scales take"),
        ({"d": 10, "targets": "classifier.bias"}, "only 3 parameters"),
    ],
)
def test_a_projection_that_can_not_be_is_refused(settings: dict[str, Any], told: str) -> None:
    model = BERT.build()
    with pytest.raises(SettingsError, match=told):
        gt.attach(model, gt.SAID(**settings))
    assert not gt.adapters(model)


@pytest.mark.parametrize("settings", [{"d": 0}, {"d": 2.5}, {"seed": -1}, {"d": "many"}])
def test_values_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match="SAID"):
        gt.SAID(**settings)


def test_targets_that_name_nothing_are_refused() -> None:
    with pytest.raises(AnatomyError, match="norm"):
        gt.attach(BERT.build(), gt.SAID(targets="normz"))


def test_rows_are_refused() -> None:
    model = BERT.build()
    moved(model)
    with pytest.raises(AdapterError, match="changes whole weights"):
        gt.activate(model, gt.Rows(["task", None]))


def test_no_activation_of_a_tensors_size_is_kept_for_the_backward_pass() -> None:
    model = BERT.build()
    adapter = moved(model)
    graft = max(adapter.grafts, key=lambda g: model.get_parameter(g.place.key).numel())
    base = model.get_parameter(graft.place.key)
    kept: list[int] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        graft.delta(base, base).sum().backward()
    assert max(kept) < base.numel()
    assert graft.delta.common.intrinsic.grad is not None


def test_a_new_head_can_be_moved_too_and_its_start_is_kept(tmp_path: Path) -> None:
    model = BERT.build()
    adapter = moved(model, project_head=True)
    assert (
        adapter.count() == 100 == gt.SAID(d=100, project_head=True).count(model, gt.anatomy(model))
    )
    assert {g.place.key for g in adapter.grafts if g.delta.start is not None} == {
        "classifier.weight",
        "classifier.bias",
    }
    adapter.save(tmp_path / "a")
    stored = safetensors.torch.load_file(tmp_path / "a" / "adapter_model.safetensors")
    head = sum(p.numel() for p in model.classifier.parameters() if p.requires_grad is False)
    assert sum(t.numel() for t in stored.values()) == 100 + head
    fresh = BERT.build()
    with torch.no_grad():
        for tensor in fresh.classifier.parameters():
            tensor.add_(1.0)  # another random head
    gt.load(fresh, tmp_path / "a")
    assert torch.equal(logits(fresh, BERT.inputs()), logits(model, BERT.inputs()))


def test_a_new_head_among_the_targets_keeps_its_start() -> None:
    adapter = gt.attach(BERT.build(), gt.SAID(d=50, targets="classifier"), name="task")
    assert [g.delta.start is not None for g in adapter.grafts] == [True, True]
