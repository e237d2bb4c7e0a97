"""A host's own tensors are others while it runs, and only then."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graftune as gt
from graftune.errors import AdapterError
from graftune.sites.parameter import OwnValue
from graftune.sites.state import Plan
from tests.contract.subjects import logits, shake
from tests.families import FAMILIES


def bert(*names: str, **options: Any) -> Any:
    """Returns a model with a BitFit of each name, off its start; the last is active."""
    model = FAMILIES["bert"].build(**options)
    for seed, name in enumerate(names):
        shake(gt.attach(model, gt.BitFit(), name), seed)
    return model


def test_after_a_forward_the_host_is_as_it_was() -> None:
    model = bert("a")
    host = model.bert.encoder.layer[0].intermediate.dense
    before = dict(host.__dict__)
    logits(model, FAMILIES["bert"].inputs())
    assert host.__dict__.keys() == before.keys()
    assert host.bias is host._parameters["bias"]


def test_after_an_exception_in_the_host_it_is_as_it_was() -> None:
    model = bert("a")
    host = model.bert.encoder.layer[0].intermediate.dense
    bias = host._parameters["bias"]
    with pytest.raises(RuntimeError):
        host(torch.randn(2, 31))  # 32 features expected
    assert "bias" not in host.__dict__
    assert host.bias is bias
    gt.activate(model, None)
    x = torch.randn(2, 32)
    assert torch.equal(host(x), F.linear(x, host.weight, bias))


def test_after_an_exception_deeper_in_the_model_it_is_the_base_again() -> None:
    model, inputs = bert("a"), FAMILIES["bert"].inputs()
    with gt.using(model, None):
        base = logits(model, inputs)

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    handle = model.classifier.register_forward_hook(fail)
    with pytest.raises(ZeroDivisionError), gt.using(model, "a"):
        logits(model, inputs)
    handle.remove()
    gt.activate(model, None)
    assert torch.equal(logits(model, inputs), base)
    assert not any("weight" in m.__dict__ or "bias" in m.__dict__ for m in model.modules())


def test_an_interrupted_forward_leaves_nothing_behind() -> None:
    """Ctrl-C is no Exception: torch runs no hook after it."""
    model, inputs = bert("a"), FAMILIES["bert"].inputs()
    with gt.using(model, None):
        base = logits(model, inputs)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = model.classifier.register_forward_pre_hook(interrupt)
    with contextlib.suppress(KeyboardInterrupt):
        logits(model, inputs)
    handle.remove()
    gt.activate(model, None)
    assert torch.equal(logits(model, inputs), base)
    gt.detach(model, "a")
    assert not any("weight" in m.__dict__ or "bias" in m.__dict__ for m in model.modules())


def test_stacked_changes_of_a_tensor_add() -> None:
    model = bert("a", "b")
    host = model.bert.encoder.layer[0].intermediate.dense
    own = [host.deltas[name]._modules["bias"].value for name in "ab"]
    gt.activate(model, gt.Stack("a", "b"))
    x = torch.randn(3, 32)
    bias = own[0] + (own[1] - host.bias)
    torch.testing.assert_close(host(x), F.linear(x, host.weight, bias))


def test_stacked_heads_take_the_last() -> None:
    model, inputs = bert("a", "b"), FAMILIES["bert"].inputs()
    gt.activate(model, gt.Stack("b", "a"))
    head = model.classifier.deltas["a"]
    seen: list[Tensor] = []
    handle = model.classifier.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    got = logits(model, inputs)
    handle.remove()
    expected = F.linear(seen[0], head._modules["weight"].value, head._modules["bias"].value)
    assert torch.equal(got, expected)


def test_gradients_reach_the_value_in_use() -> None:
    model = bert("a")
    host = model.bert.encoder.layer[0].intermediate.dense
    x = torch.randn(3, 32)
    host(x).sum().backward()
    own = host.deltas["a"]._modules["bias"].value
    torch.testing.assert_close(own.grad, torch.full((128,), 3.0))
    assert host.bias.grad is None


def test_own_values_alone_are_used_bit_for_bit_and_in_the_hosts_type() -> None:
    base = torch.randn(4, dtype=torch.bfloat16)
    delta = OwnValue(base.float() + 1e-4)
    assert delta.value.dtype == torch.float32
    assert torch.equal(delta(base, base), delta.value.to(torch.bfloat16))


def test_a_missing_tensors_values_add() -> None:
    one, two = OwnValue(torch.ones(3)), OwnValue(torch.full((3,), 2.0))
    assert torch.equal(two(one(None, None), None), torch.full((3,), 3.0))


@pytest.mark.parametrize("family", ["gpt2", "t5", "gemma2"])
def test_a_tied_tensors_value_is_seen_by_all_that_are_tied(family: str) -> None:
    model: Any = FAMILIES[family].build()
    adapter = gt.attach(model, gt.FullFineTuning(keep_base=True))
    tied: Any = next(t for t in adapter.parameters() if t.shape == (99, 32))
    with torch.no_grad():
        tied.add_(1)
    base = model.get_output_embeddings()._parameters["weight"]
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    ids, x = torch.arange(99), torch.randn(3, 32)
    scale = float(getattr(embedding, "embed_scale", 1.0))
    torch.testing.assert_close(embedding(ids), tied * scale)
    torch.testing.assert_close(head(x), x @ tied.t())
    assert not torch.equal(base, tied)


def test_rows_of_heads_of_two_sizes_are_refused_in_one_batch() -> None:
    model, inputs = bert("a"), FAMILIES["bert"].inputs()
    head: Any = model.classifier.deltas["a"]
    head.weight.value = nn.Parameter(torch.randn(5, 32))
    head.bias.value = nn.Parameter(torch.randn(5))
    sizes = pytest.raises(AdapterError, match="Rows mixes heads of different sizes")
    with gt.using(model, gt.Rows(["a", None])), sizes:
        logits(model, inputs)
    with gt.using(model, gt.Rows(["a", "a"])):
        assert logits(model, inputs).shape == (2, 5)


def test_a_head_of_another_size_is_used_alone() -> None:
    base = torch.randn(3, 4)
    delta = OwnValue(torch.randn(5, 4), adds=False)
    assert torch.equal(delta(base, base), delta.value)


def test_rows_of_a_module_that_gives_back_several_things_are_refused() -> None:
    model = FAMILIES["mixtral"].build()
    for name in "ab":
        gt.attach(model, gt.FullFineTuning(keep_base=True), name)
    router = model.get_submodule("model.layers.0.mlp.gate")
    active = gt.state_of(model).active
    rows = gt.Rows(["a", "b"])
    with active.pinned(Plan.of(rows)), pytest.raises(AdapterError, match="Router reads the tens"):
        router(torch.randn(4, 32))
