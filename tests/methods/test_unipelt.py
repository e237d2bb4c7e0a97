"""UniPELT: its gates on the prefix, in attention's equation, and what closing them leaves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import graftune as gt
from graftune.errors import SettingsError
from graftune.sites.base import PlaceBeside
from tests.contract.subjects import logits, shake
from tests.families import FAMILIES
from tests.methods.changes import learns

SMALL = gt.UniPELT(length=3, hidden=8, reduction=8, r=2)


def attached(method: Any, family: str = "bert", noise: float = 0.2) -> tuple[Any, gt.Adapter]:
    model = FAMILIES[family].build()
    adapter = gt.attach(model, method, "task", seed=1)
    shake(adapter, 1, noise)
    return model, adapter


def test_the_papers_settings_are_the_defaults() -> None:
    prefix, adapter, lora = gt.UniPELT().parts
    assert (prefix.length, prefix.hidden) == (10, 512)  # type: ignore[attr-defined]
    assert (adapter.reduction, adapter.sublayers) == (16, ("ffn",))  # type: ignore[attr-defined]
    assert (lora.r, lora.targets) == (8, ("query", "value"))  # type: ignore[attr-defined]
    assert {part.gate for part in gt.UniPELT().parts} == {"auto"}  # type: ignore[attr-defined]
    assert [p.name for p in gt.UniPELT(submodules=("prefix", "adapter")).parts] == [
        "PrefixTuning",
        "PfeifferAdapter",
    ]


def recorded(model: Any, path: str, inputs: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """Returns what an attention's q, k and v answer and what it is given, and its own answer."""
    found: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(f"{path}.{name}").register_forward_hook(
            lambda _, args, y, name=name: found.update({name: y.detach(), "x": args[0].detach()})
        )
        for name in ("query", "key", "value")
    ]
    handles.append(
        model.get_submodule(path).register_forward_hook(
            lambda _, args, y: found.update(answer=y[0].detach())
        )
    )
    logits(model, inputs)
    for handle in handles:
        handle.remove()
    return found, found.pop("answer")


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("kind", ["token", "mean", "mean-padded"])
def test_gates_multiply_keys_and_values_of_the_prefix(kind: str, shared: bool) -> None:
    method = gt.PrefixTuning(length=3, hidden=None, gate=kind, shared_gate=shared)
    model, adapter = attached(method, noise=0.5)
    path = "bert.encoder.layer.0.attention.self"
    inputs = FAMILIES["bert"].inputs(padding="right")
    seen, answer = recorded(model, path, inputs)
    own = {n.removeprefix(f"{path}.prefix."): t for n, t in adapter.state_dict().items()}
    mask = inputs["attention_mask"].bool()
    G = torch.sigmoid(seen["x"] @ own["gate.weight"].T + own["gate.bias"])  # (B, T, 1 or 2)
    if kind == "mean":
        G = torch.stack([g[m].mean(0, keepdim=True) for g, m in zip(G, mask, strict=True)])
    elif kind == "mean-padded":
        G = G.mean(1, keepdim=True)
    heads = model.config.num_attention_heads
    size = answer.shape[-1] // heads
    for row in range(len(answer)):
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            q, k, v = (seen[name][row, :, part] for name in ("query", "key", "value"))
            g_k, g_v = G[row, :, :1], G[row, :, -1:]  # (T or 1, 1)
            before = (q @ own["key"][:, part].T) * g_k * size**-0.5
            after = (q @ k.T * size**-0.5).masked_fill(~mask[row], float("-inf"))
            weights = torch.cat([before, after], -1).softmax(-1)
            expected = g_v * (weights[:, :3] @ own["value"][:, part]) + weights[:, 3:] @ v
            torch.testing.assert_close(answer[row, :, part], expected, atol=2e-6, rtol=1e-5)


def test_closed_gates_of_adapter_and_lora_leave_the_prefix() -> None:
    model, adapter = attached(SMALL)
    alone = FAMILIES["bert"].build()
    one = gt.attach(alone, SMALL.parts[0], "task")
    own = adapter.state_dict()
    one.load_state_dict({name: own[name] for name in one.state_dict()})
    for graft in adapter.grafts:
        gate: Any = graft.delta._modules.get("gate")
        if gate is not None and not graft.place.key.endswith(".prefix"):
            gate.weight.data.zero_()
            gate.bias.data.fill_(-1e4)  # sigmoid is 0 exactly
    inputs = FAMILIES["bert"].inputs(padding="right")
    assert torch.equal(logits(model, inputs), logits(alone, inputs))
    for graft in adapter.grafts:  # and without the prefix it is the base
        if isinstance(graft.place, PlaceBeside) and graft.place.key.endswith(".prefix"):
            sites: Any = model.get_submodule(graft.place.module).deltas
            del sites._modules["attention"]._modules["task"]
    with torch.no_grad():
        adapter.load_state_dict(
            {n: t for n, t in own.items() if n.startswith("classifier")}, strict=False
        )
    base = FAMILIES["bert"].build()
    base.load_state_dict({n: t for n, t in own.items() if n.startswith("classifier")}, strict=False)
    assert torch.equal(logits(model, inputs), logits(base, inputs))


def test_a_gate_of_nothing_doesnt_hide_the_prefix() -> None:
    model, adapter = attached(gt.PrefixTuning(length=3, hidden=None, gate="token"))
    for graft in adapter.grafts:
        gate: Any = graft.delta._modules.get("gate")
        if gate is not None:
            gate.weight.data.zero_()
            gate.bias.data.fill_(-1e4)
    inputs, base = FAMILIES["bert"].inputs(), FAMILIES["bert"].build()
    assert not torch.allclose(logits(model, inputs), logits(base, inputs), atol=1e-4)


def test_gates_stay_when_the_mlp_is_dropped() -> None:
    model, adapter = attached(SMALL)
    inputs = FAMILIES["bert"].inputs(padding="right")
    before, gates = logits(model, inputs), {n for n in adapter.state_dict() if ".gate." in n}
    adapter.finish()
    assert {n for n in adapter.state_dict() if ".gate." in n} == gates
    assert torch.equal(logits(model, inputs), before)


@pytest.mark.parametrize("family", ["llama", "bloom", "gpt2"])
def test_gated_prefixes_generate_the_same_with_and_without_a_cache(family: str) -> None:
    model, _ = attached(gt.UniPELT(length=3, hidden=None, reduction=8, r=2), family)
    inputs = FAMILIES[family].inputs(padding="left")
    settings = {"max_new_tokens": 5, "do_sample": False, "output_scores": True}
    found = [
        model.generate(**inputs, **settings, use_cache=cache, return_dict_in_generate=True)
        for cache in (True, False)
    ]
    assert torch.equal(found[0].sequences, found[1].sequences)
    for one, other in zip(found[0].scores, found[1].scores, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_gated_and_plain_prefixes_act_together() -> None:
    model, _ = attached(gt.PrefixTuning(length=3, hidden=None, gate="token"), "llama")
    for name, settings in (("plain", {}), ("second", {"gate": "token"})):
        shake(gt.attach(model, gt.PrefixTuning(length=2, hidden=None, **settings), name, seed=3), 4)
    inputs = FAMILIES["llama"].inputs()
    gt.activate(model, gt.Stack("task", "plain", "second"))
    one = logits(model, inputs)
    gt.activate(model, gt.Stack("second", "task", "plain"))
    torch.testing.assert_close(logits(model, inputs), one, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"submodules": ()}, "methods is empty"),
        ({"submodules": ("prefix", "bitfit")}, "submodules is 'bitfit'"),
        ({"gate": "soft"}, "PrefixTuning: gate is 'soft'"),
        ({"r": 0}, "LoRA: r is 0"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        gt.UniPELT(**settings)


def test_training_learns_and_moves_every_gate() -> None:
    first, last = learns(SMALL, "bert")
    assert last < 0.8 * first
