"""LLaMA-Adapter: its equation, gates, layers, what trains first, refusals."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

import graftune as gt
from graftune.errors import AnatomyError, SettingsError
from graftune.sites.remembered import Remembered
from tests.contract.subjects import logits, shake
from tests.families import FAMILIES
from tests.methods.changes import learns


def test_the_published_settings_are_the_defaults() -> None:
    method = gt.LLaMAAdapter()
    assert (method.length, method.gate, method.default_lr) == (10, "head", 9e-3)


@pytest.mark.parametrize(
    ("depth", "layers", "expected"),
    [
        (1, None, [0]),
        (2, None, [1]),
        (3, None, [1, 2]),
        (6, None, [2, 3, 4, 5]),
        (6, "-3:", [3, 4, 5]),
        (6, 0, [0]),
    ],
)
def test_the_upper_blocks_get_one(depth: int, layers: Any, expected: list[int]) -> None:
    model = FAMILIES["llama"].build(meta=True, num_hidden_layers=depth)
    adapter = gt.attach(model, gt.LLaMAAdapter(layers=layers))
    assert [graft.place.module for graft in adapter.grafts] == [
        f"model.layers.{layer}.self_attn" for layer in expected
    ]


def test_both_stacks_of_an_encoder_decoder_get_theirs_below_no_cross_attention() -> None:
    adapter = gt.attach(FAMILIES["t5"].build(), gt.LLaMAAdapter())
    assert [graft.place.module for graft in adapter.grafts] == [
        "encoder.block.1.layer.0.SelfAttention",
        "decoder.block.1.layer.0.SelfAttention",
    ]


def test_initial_values_and_names() -> None:
    adapter = gt.attach(FAMILIES["bert"].build(), gt.LLaMAAdapter(length=900, train_head=False))
    found = adapter.state_dict()
    home = "bert.encoder.layer.1.attention.self.prompt"
    assert {name: tuple(t.shape) for name, t in found.items()} == {
        f"{home}.P": (900, 32),
        f"{home}.gate": (4,),
    }
    assert abs(found[f"{home}.P"].std().item() - 1) < 0.02
    assert not found[f"{home}.gate"].any()


def rotated(module: Any, x: Tensor, positions: tuple[Tensor, Tensor] | None) -> Tensor:
    """Returns queries, `(B, T, H, D)`: LLaMA's half-turned, GPT-2's as they are."""
    if positions is None:
        return module.c_attn(x)[..., :32].unflatten(-1, (4, 8))
    query = module.q_proj(x).unflatten(-1, (4, 8))
    if hasattr(module, "q_norm"):
        query = module.q_norm(query)
    first, second = query.chunk(2, -1)
    cos, sin = (table[:, :, None] for table in positions)
    return query * cos + torch.cat([-second, first], -1) * sin


def plain(module: Any, query: Tensor, P: Tensor, gate: Tensor) -> Tensor:
    """Returns g Attn(q, P W_k, P W_v), token by token and head by head."""
    if hasattr(module, "c_attn"):
        _, key, value = (P @ module.c_attn.weight + module.c_attn.bias).chunk(3, -1)
    else:
        key, value = module.k_proj(P), module.v_proj(P)
    key, value = (of.unflatten(-1, (-1, 8)) for of in (key, value))
    if hasattr(module, "k_norm"):
        key = module.k_norm(key)
    out = torch.zeros(query.shape)
    for row in range(query.shape[0]):
        for token in range(query.shape[1]):
            for head in range(4):
                own = head // (4 // key.shape[1])
                scores = key[:, own] @ query[row, token, head] / 8**0.5
                out[row, token, head] = gate[head] * (scores.softmax(0) @ value[:, own])
    return out.flatten(2)


@pytest.mark.parametrize("gate", ["head", "layer"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_the_equation(family: str, gate: str) -> None:
    model, inputs = FAMILIES[family].build(), FAMILIES[family].inputs()
    method = gt.LLaMAAdapter(length=3, gate=gate)
    adapter = gt.attach(model, method, seed=0)
    shake(adapter, seed=1, noise=0.5)
    P, g = (tensor.detach() for tensor in adapter.parameters())
    g = torch.tanh(g) if gate == "head" else g.expand(4)
    path = adapter.grafts[0].place.module
    module: Any = model.get_submodule(path)
    seen: dict[str, Any] = {}
    host = module.get_submodule("c_proj" if family == "gpt2" else "o_proj")
    host.register_forward_pre_hook(lambda _, args: seen.update(out=args[0]))
    module.register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(x=(*args, kwargs.get("hidden_states"))[0], **kwargs),
        with_kwargs=True,
    )
    logits(model, inputs)
    changed, query = seen["out"], rotated(module, seen["x"], seen.get("position_embeddings"))
    with gt.using(model, None):
        logits(model, inputs)
    torch.testing.assert_close(
        changed - seen["out"], plain(module, query, P, g), atol=2e-6, rtol=1e-5
    )


@pytest.mark.parametrize("gate", ["head", "layer"])
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "t5"])
def test_a_shut_gate_is_the_base_and_opens_first(family: str, gate: str) -> None:
    kind = FAMILIES[family]
    model, inputs = kind.build(), kind.inputs()
    base = logits(model, inputs)
    adapter = gt.attach(model, gt.LLaMAAdapter(length=3, gate=gate, train_head=False))
    assert torch.equal(logits(model, inputs), base)
    start = {name: tensor.detach().clone() for name, tensor in adapter.named_parameters()}
    optimizer = torch.optim.SGD(list(adapter.parameters()), lr=0.1)
    for moved in ({"gate"}, {"gate", "P"}):
        optimizer.zero_grad()
        model(**inputs, **kind.labels(model, inputs)).loss.backward()
        optimizer.step()
        changed = {n for n, t in adapter.named_parameters() if not torch.equal(t, start[n])}
        assert {name.rpartition(".")[2] for name in changed} == moved
        assert len(changed) == len(moved) * len(adapter.grafts)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_cache_token_by_token_is_one_pass(family: str) -> None:
    model, inputs = FAMILIES[family].build(), FAMILIES[family].inputs(length=9)
    shake(gt.attach(model, gt.LLaMAAdapter(length=3), seed=0), seed=1, noise=1)
    cache, steps = DynamicCache(config=model.config), []
    with torch.no_grad():
        for at in range(9):
            ids = inputs["input_ids"][:, at : at + 1]
            steps.append(model(input_ids=ids, past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(steps, 1), logits(model, inputs), atol=2e-6, rtol=1e-5)
    assert cache.get_seq_length() == 9


def test_adapters_on_the_projections_change_the_queries_alone() -> None:
    model, inputs = FAMILIES["llama"].build(), FAMILIES["llama"].inputs()
    shake(gt.attach(model, gt.LoRA(targets=("key", "value")), "lora", seed=0), seed=1)
    adapter = gt.attach(model, gt.LLaMAAdapter(length=3, layers=0), "prompt", seed=0)
    shake(adapter, seed=2, noise=1)
    module: Any = model.get_submodule("model.layers.0.self_attn")
    delta = module.deltas["prompt"]
    query = torch.randn(2, 4, 5, 8, generator=torch.Generator().manual_seed(0))
    alone = delta.added(query, module, None)
    gt.activate(model, gt.Stack("lora", "prompt"))
    assert torch.equal(delta.added(query, module, None), alone)
    assert not torch.equal(logits(model, inputs), logits(with_only(model, "prompt"), inputs))


def with_only(model: nn.Module, name: str) -> nn.Module:
    gt.activate(model, name)
    return model


def test_two_and_a_prefix_add_up() -> None:
    model, inputs = FAMILIES["llama"].build(), FAMILIES["llama"].inputs()
    top = {"layers": 1, "length": 3}
    for seed, name in enumerate("ab"):
        shake(gt.attach(model, gt.LLaMAAdapter(**top), name, seed=seed), seed=seed, noise=1)
    gt.attach(model, gt.PrefixTuning(hidden=None, **top), "p", seed=3)
    seen: list[Tensor] = []
    host = model.get_submodule("model.layers.1.self_attn.o_proj")
    host.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for members in (("a",), ("b",), ("p",), ("a", "p", "b"), None):
        with gt.using(model, members and gt.Stack(*members)):
            logits(model, inputs)
    a, b, p, together, base = seen
    torch.testing.assert_close(together, p + (a - base) + (b - base), atol=2e-6, rtol=1e-5)


class Counted:
    """A projection's forward that counts how often it is given an adapter's vectors."""

    def __init__(self, host: Any, rows: int) -> None:
        self.forward, self.rows, self.times = host.forward, rows, 0
        host.forward = self

    def __call__(self, x: Tensor) -> Tensor:
        self.times += x.ndim == 2 and len(x) == self.rows
        return self.forward(x)


def opened(family: str = "llama") -> tuple[Any, gt.Adapter, dict[str, Tensor]]:
    """Returns a model with an adapter whose gates are open, and inputs."""
    model = FAMILIES[family].build()
    adapter = gt.attach(model, gt.LLaMAAdapter(length=3, layers=":", train_head=False), seed=1)
    shake(adapter, seed=2, noise=0.5)
    return model, adapter, FAMILIES[family].inputs()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "t5"])
def test_what_is_kept_answers_bit_for_bit(family: str) -> None:
    model, adapter, inputs = opened(family)
    first = logits(model, inputs)
    again = logits(model, inputs)
    for graft in adapter.grafts:
        assert graft.delta.kept._found is not None
        graft.delta.kept.forget()
    assert torch.equal(first, again)
    with_gradient = model(**inputs).logits.detach()
    assert torch.equal(again, with_gradient)
    assert all(graft.delta.kept._found is None for graft in adapter.grafts)


def test_the_vectors_are_projected_once_for_all_tokens_generated() -> None:
    model, _, inputs = opened()
    counted = [Counted(layer.self_attn.k_proj, 3) for layer in model.model.layers]
    model.generate(inputs["input_ids"], max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert [one.times for one in counted] == [1, 1]
    model.train()
    for _ in range(2):
        model(**inputs)
    assert [one.times for one in counted] == [3, 3]


def _in_place(model: Any, adapter: gt.Adapter) -> None:
    with torch.no_grad():
        adapter.grafts[0].delta.P.add_(1)


def _loaded(model: Any, adapter: gt.Adapter) -> None:
    adapter.load_state_dict({name: t + 0.5 for name, t in adapter.state_dict().items()})


def _weight(model: Any, adapter: gt.Adapter) -> None:
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight.mul_(2)


def _replaced(model: Any, adapter: gt.Adapter) -> None:
    host = model.model.layers[0].self_attn.k_proj
    host.weight = nn.Parameter(host.weight.detach() * 2, requires_grad=False)


def _swapped(model: Any, adapter: gt.Adapter) -> None:
    host = model.model.layers[0].self_attn.k_proj
    host.weight.data = host.weight.data * 2


def _merged(model: Any, adapter: gt.Adapter) -> None:
    lora = gt.attach(model, gt.LoRA(r=2, targets=["key", "value"]), "lora", seed=4)
    shake(lora, seed=4, noise=0.5)
    gt.merge(model, "lora")
    gt.activate(model, adapter.name)


def _stepped(model: Any, adapter: gt.Adapter) -> None:
    inputs = FAMILIES["llama"].inputs()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    torch.optim.AdamW(adapter.parameters(), lr=0.1).step()


CHANGES = [_in_place, _loaded, _weight, _replaced, _swapped, _merged, _stepped]


@pytest.mark.parametrize("change", CHANGES, ids=[change.__name__[1:] for change in CHANGES])
def test_what_is_kept_is_never_stale(change: Any) -> None:
    model, adapter, inputs = opened()
    before = logits(model, inputs)
    change(model, adapter)
    got = logits(model, inputs)
    for graft in adapter.grafts:
        graft.delta.kept.forget()
    assert torch.equal(got, logits(model, inputs))
    assert not torch.equal(got, before)


def test_a_weight_at_the_address_of_another_is_another() -> None:
    remembered, weight = Remembered(), torch.ones(4)

    def made(source: Tensor) -> Tensor:
        return remembered.get([source], None, lambda: (source + 1, source))[0]

    assert made(weight).tolist() == [2] * 4
    alias = nn.Parameter(weight, requires_grad=False)
    weight.zero_()
    assert made(alias).tolist() == [1] * 4
    assert made(weight).tolist() == [1] * 4
    for _ in range(5):  # storages that take each other's place
        weight.data = torch.rand(4)
        assert torch.equal(made(weight), weight + 1)


def test_copies_keep_nothing_of_what_was_kept() -> None:
    model, adapter, inputs = opened()
    expected = logits(model, inputs)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other, inputs), expected)
        with torch.no_grad():
            for tensor in other.parameters():
                tensor.mul_(1.5)
        assert not torch.equal(logits(other, inputs), expected)
        assert torch.equal(logits(model, inputs), expected)
    assert not any("kept" in name for name in adapter.state_dict())


def test_training_learns() -> None:
    first, last = learns(gt.LLaMAAdapter(length=20, layers=":"), "t5")
    assert last < 0.9 * first


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"length": 0}, "length is 0, expected at least 1"),
        ({"gate": "heads"}, r"gate is 'heads', expected one of head, layer.*\"head\""),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        gt.LLaMAAdapter(**settings)


def test_layers_that_are_not_there_are_refused() -> None:
    model = FAMILIES["llama"].build()
    with pytest.raises(AnatomyError, match="Layer 7 is out of range"):
        gt.attach(model, gt.LLaMAAdapter(layers=7))
    assert gt.adapters(model) == {}
