"""The unified view: its known points are the methods themselves, the others their equations."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

import graftune as gt
from graftune.errors import SettingsError
from graftune.methods.unified import COMPOSITIONS, FORMS, INSERTIONS, LOCATIONS
from tests.contract.subjects import logits, shake
from tests.families import FAMILIES


def attached(method: Any, family: str = "bert", noise: float = 0.2) -> tuple[Any, gt.Adapter]:
    model = FAMILIES[family].build()
    adapter = gt.attach(model, method, "task", seed=1)
    shake(adapter, 1, noise)
    return model, adapter


def point(form: str, insertion: str, location: str, composition: str, **more: Any) -> Any:
    return gt.UnifiedAdapter(
        form=form, insertion=insertion, location=location, composition=composition, **more
    )


KNOWN = {
    "lora": (
        point("linear", "parallel", "matrix", "scaled", k=4, scale=2.0, targets="qv"),
        gt.LoRA(r=4, alpha=8, targets="qv"),
    ),
    "gated lora": (
        point("linear", "parallel", "matrix", "gated", k=4),
        gt.LoRA(r=4, gate="auto"),
    ),
    "prefix": (
        point("softmax", "parallel", "head", "gated", k=3),
        gt.PrefixTuning(length=3, hidden=None),
    ),
    "houlsby": (
        point("relu", "sequential", "ffn", "add", k=5),
        gt.HoulsbyAdapter(sublayers=("ffn",), bottleneck=5, activation="relu", train_norms=False),
    ),
    "scaled parallel": (
        point("relu", "parallel", "ffn", "scaled", k=5),
        gt.ParallelAdapter(bottleneck=5, scale=4.0),
    ),
    "gated parallel": (
        point("gelu", "parallel", "attention", "gated", k=5),
        gt.ParallelAdapter(
            sublayers=("attention", "cross-attention"),
            bottleneck=5,
            activation="gelu",
            scale=1.0,
            gate="auto",
        ),
    ),
}


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5"])
@pytest.mark.parametrize("name", KNOWN)
def test_a_known_point_is_the_method_bit_for_bit(name: str, family: str) -> None:
    found, method = KNOWN[name]
    inputs = FAMILIES[family].inputs(padding="right")
    model, adapter = attached(found, family)
    other, same = attached(method, family)
    assert adapter.state_dict().keys() == same.state_dict().keys()
    assert torch.equal(logits(model, inputs), logits(other, inputs))
    assert adapter.count() == same.count()
    if name == "lora":
        gt.merge(model, "task")
        gt.merge(other, "task")
        assert torch.equal(logits(model, inputs), logits(other, inputs))


def recorded(model: Any, path: str, inputs: Any, *names: str) -> dict[str, torch.Tensor]:
    """Returns what some modules of an attention answer, and the attention itself as "answer"."""
    found: dict[str, torch.Tensor] = {}
    handles = [
        model.get_submodule(f"{path}.{name}").register_forward_hook(
            lambda _, args, y, name=name: found.update({name: y.detach(), "x": args[0].detach()})
        )
        for name in names
    ]
    handles.append(
        model.get_submodule(path).register_forward_hook(
            lambda _, args, y: found.update(answer=(y[0] if isinstance(y, tuple) else y).detach())
        )
    )
    logits(model, inputs)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("form", FORMS)
def test_each_head_adds_its_own_change_of_the_queries(form: str) -> None:
    inputs = FAMILIES["bert"].inputs()
    found = point(form, "parallel", "head", "scaled", k=3, scale=2.0)
    model, adapter = attached(found)
    graft = adapter.grafts[0]
    with_it = recorded(model, graft.place.module, inputs, "query")
    gt.activate(model, None)
    without = recorded(model, graft.place.module, inputs, "query")
    delta: Any = graft.delta
    heads, _, size = delta.P_k.shape
    q = with_it["query"].unflatten(-1, (heads, size))  # (B, n, H, D)
    scores = torch.einsum("bnhd,hkd->bnhk", q, delta.P_k) * size**-0.5
    f = {
        "softmax": lambda z: z.softmax(-1),
        "relu": torch.relu,
        "gelu": torch.nn.functional.gelu,
        "linear": lambda z: z,
    }[form]
    change = torch.einsum("bnhk,hkd->bnhd", f(scores), delta.P_v).flatten(2)
    assert torch.allclose(with_it["answer"], without["answer"] + 2 * change.detach(), atol=1e-6)


@pytest.mark.parametrize(("insertion", "reads"), [("parallel", "x"), ("sequential", "query")])
def test_a_matrix_adds_its_change_of_what_it_reads(insertion: str, reads: str) -> None:
    inputs = FAMILIES["bert"].inputs()
    found = point("gelu", insertion, "matrix", "scaled", k=3, scale=2.0, targets="query", layers=0)
    model, adapter = attached(found)
    graft = adapter.grafts[0]
    assert [one.place.module for one in adapter.grafts].count(graft.place.module) == 1
    path = graft.place.module.rpartition(".")[0]
    with_it = recorded(model, path, inputs, "query")
    gt.activate(model, None)
    without = recorded(model, path, inputs, "query")
    delta: Any = graft.delta
    change = torch.nn.functional.gelu(without[reads] @ delta.down.T) @ delta.up.T
    assert torch.allclose(with_it["query"], without["query"] + 2 * change.detach(), atol=1e-6)


SPACE = list(itertools.product(FORMS, INSERTIONS, LOCATIONS, COMPOSITIONS))


def is_point(words: tuple[str, ...]) -> bool:
    form, insertion, location, composition = words
    if location == "head":
        return insertion == "parallel" and (form == "softmax" or composition != "gated")
    return form != "softmax"


@pytest.mark.parametrize("words", SPACE, ids="-".join)
def test_every_point_is_a_method_or_refused_with_the_reason(words: Any) -> None:
    if not is_point(words):
        with pytest.raises(SettingsError, match=r"UnifiedAdapter: form=.*: (a|what|at|the) .*"):
            point(*words)
        return
    more = {"targets": "attention"} if words[2] == "matrix" else {}
    method = point(*words, k=3, **more)
    assert method.from_dict(method.to_dict()) == method
    model, adapter = attached(method, "llama", 0.0)
    inputs = FAMILIES["llama"].inputs(padding="right")
    base = logits(FAMILIES["llama"].build(), inputs)
    is_zero = words[1] == "parallel" and words != ("softmax", "parallel", "head", "gated")
    assert torch.equal(logits(model, inputs), base) or not is_zero
    assert adapter.count() == sum(p.numel() for p in adapter.parameters())
    shake(adapter, 1, 0.3)
    assert not torch.allclose(logits(model, inputs), base, atol=1e-4)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    for name, tensor in adapter.named_parameters():
        assert tensor.grad is not None, name
        assert tensor.grad.abs().sum() > 0, name


def test_there_are_sixty_three_points() -> None:
    assert sum(map(is_point, SPACE)) == 63


@pytest.mark.parametrize(
    "words",
    [
        ("relu", "sequential", "matrix", "gated"),
        ("gelu", "parallel", "head", "scaled"),
        ("softmax", "parallel", "head", "add"),
    ],
    ids="-".join,
)
def test_a_new_point_is_saved_and_loaded(words: Any, tmp_path: Path) -> None:
    method = point(*words, k=3)
    for family in ("gpt2", "gpt_neox"):
        model, adapter = attached(method, family)
        inputs = FAMILIES[family].inputs(padding="left")
        adapter.save(tmp_path / family)
        other = FAMILIES[family].build()
        loaded = gt.load(other, tmp_path / family)
        assert loaded.method == method
        assert torch.equal(logits(other, inputs), logits(model, inputs))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"form": "tanh"}, "form is \"tanh\"|form is 'tanh'"),
        ({"location": "fnn"}, 'Did you mean "ffn"'),
        ({"composition": "add", "scale": 2.0}, '"add" has no scale, but scale is 2'),
        ({"targets": "qv"}, "targets is 'qv', which chooses matrices"),
        ({"form": "softmax"}, 'location="head"'),
        (
            {"form": "softmax", "location": "head", "composition": "gated", "scale": 2.0},
            "the softmax alone weighs a prefix",
        ),
        ({"location": "head", "insertion": "sequential"}, 'targets="output"'),
        ({"k": 0}, "k is 0"),
    ],
)
def test_what_can_not_be_is_told(settings: Any, told: str) -> None:
    with pytest.raises(SettingsError, match=told):
        gt.UnifiedAdapter(**settings)


def test_experts_are_refused() -> None:
    with pytest.raises(SettingsError, match="is no single linear"):
        gt.attach(FAMILIES["mixtral"].build(), point("relu", "parallel", "matrix", "add", k=2))
