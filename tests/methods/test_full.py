"""Full fine-tuning: in place as the reference, or beside the base."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import graftune as gt
from graftune.errors import AdapterError
from tests.contract.subjects import logits, same, shake, tensors
from tests.families import FAMILIES


def trained(
    family: str, method: gt.FullFineTuning, steps: int = 3
) -> tuple[nn.Module, list[Tensor]]:
    """Returns a model after steps of SGD with momentum, and the loss of each."""
    model, inputs = FAMILIES[family].build(), FAMILIES[family].inputs()
    adapter = gt.attach(model, method)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.05, momentum=0.9)
    losses: list[Tensor] = []
    for _ in range(steps):
        loss = model(**inputs).logits.pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return model, losses


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5", "mixtral"])
def test_beside_the_base_is_in_place_step_for_step(family: str) -> None:
    there, losses = trained(family, gt.FullFineTuning())
    beside, others = trained(family, gt.FullFineTuning(keep_base=True))
    assert all(torch.equal(a, b) for a, b in zip(losses, others, strict=True))
    assert losses[0] != losses[-1]
    inputs = FAMILIES[family].inputs()
    assert torch.equal(logits(there, inputs), logits(beside, inputs))
    gt.merge(beside, "default")
    assert same(tensors(beside), tensors(there))


def test_in_place_has_no_second_copy() -> None:
    model = FAMILIES["bert"].build()
    adapter = gt.attach(model, gt.FullFineTuning())
    assert adapter.grafts == []
    own = {id(p) for p in adapter.parameters()}
    assert own == {id(p) for p in model.parameters()}
    assert all(p.requires_grad for p in model.parameters())
    assert adapter.count() == sum(p.numel() for p in model.parameters())
    assert not any("deltas" in name for name, _ in model.named_modules())


def test_in_place_keeps_a_tied_tensor_once() -> None:
    adapter = gt.attach(FAMILIES["gpt2"].build(), gt.FullFineTuning(keep_base=True))
    names = [n for n, _ in adapter.named_parameters()]
    assert "transformer.wte.weight" in names
    assert "lm_head.weight" not in names


@pytest.mark.parametrize("composition", [None, "other", gt.Stack("default", "other")])
def test_in_place_can_not_be_switched_off(composition: gt.Stack | str | None) -> None:
    model = FAMILIES["bert"].build()
    gt.attach(model, gt.FullFineTuning())
    with pytest.raises(AdapterError, match=r'in place|named "other"'):
        gt.activate(model, composition)
    with pytest.raises(AdapterError, match=r'in place|named "other"'), gt.using(model, composition):
        pass
    gt.activate(model, "default")


def test_in_place_can_not_be_taken_off() -> None:
    model = FAMILIES["bert"].build()
    gt.attach(model, gt.FullFineTuning())
    with pytest.raises(AdapterError, match=r'"default" trained the base in place.*keep_base=True'):
        gt.detach(model, "default")
    with pytest.raises(AdapterError, match="in place"):
        gt.merge(model, "default")
    assert list(gt.adapters(model)) == ["default"]


@pytest.mark.parametrize("method", [gt.LoRA(), gt.FullFineTuning(keep_base=True)])
def test_in_place_stays_alone(method: gt.LoRA | gt.FullFineTuning) -> None:
    model = FAMILIES["bert"].build()
    gt.attach(model, gt.FullFineTuning(), "first")
    with pytest.raises(AdapterError, match=r'"first" trains the base in place.*keep_base=True'):
        gt.attach(model, method, "second")
    assert list(gt.adapters(model)) == ["first"]


def test_in_place_does_not_join_others() -> None:
    model = FAMILIES["bert"].build()
    gt.attach(model, gt.LoRA(), "first")
    with pytest.raises(AdapterError, match='"second" trains the base in place'):
        gt.attach(model, gt.FullFineTuning(), "second")
    assert list(gt.adapters(model)) == ["first"]
    assert not model.bert.pooler.dense.weight.requires_grad


def test_beside_the_base_joins_a_lora() -> None:
    model, inputs = FAMILIES["bert"].build(), FAMILIES["bert"].inputs()
    base = logits(model, inputs)
    for name, method in {"a": gt.FullFineTuning(keep_base=True), "b": gt.LoRA()}.items():
        shake(gt.attach(model, method, name, seed=0), seed=1)
    gt.activate(model, gt.Stack("a", "b"))
    both = logits(model, inputs)
    gt.merge(model, gt.Stack("a", "b"))
    torch.testing.assert_close(logits(model, inputs), both, atol=1e-5, rtol=1e-5)
    gt.unmerge(model)
    gt.activate(model, None)
    assert torch.equal(logits(model, inputs), base)
