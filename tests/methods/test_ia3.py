"""(IA)³: what each vector scales, against a plain slow version, and stacks that merge exactly."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graftune as gt
from graftune.errors import AnatomyError, GraftuneError, SettingsError
from tests.contract.subjects import logits, same, shake, tensors
from tests.families import FAMILIES


def attached(family: str, **settings: Any) -> tuple[Any, gt.Adapter]:
    """Returns a tiny model and an (IA)³ on it, every scale moved off 1."""
    model = FAMILIES[family].build()
    adapter = gt.attach(model, gt.IA3(**settings))
    shake(adapter, seed=1, noise=0.3)
    return model, adapter


def shapes(family: str, **settings: Any) -> dict[str, tuple[int, ...]]:
    """Returns the vectors of a fresh adapter by their places in the first block or layer."""
    model = FAMILIES[family].build()
    adapter = gt.attach(model, gt.IA3(train_head=False, **settings))
    return {n.removesuffix(".l"): tuple(t.shape) for n, t in adapter.named_parameters()}


def by_head(x: Tensor, width: int) -> Tensor:
    return x.view(*x.shape[:-1], -1, width).transpose(-2, -3)  # (B, H, T, D)


def test_bert_attention_is_the_papers_equation() -> None:
    model, adapter = attached("bert")
    block: Any = model.bert.encoder.layer[0]
    vectors = dict(adapter.named_parameters())
    at = "bert.encoder.layer.0"
    l_k, l_v = (vectors[f"{at}.attention.self.{name}.l"] for name in ("key", "value"))
    l_ff = vectors[f"{at}.output.dense.input.l"]
    x = torch.randn(2, 5, 32)
    attention, width = block.attention.self, 8
    with torch.no_grad():
        q, k, v = (
            F.linear(x, m.weight, m.bias) for m in (attention.query, attention.key, attention.value)
        )
        q, k, v = by_head(q, width), by_head(l_k * k, width), by_head(l_v * v, width)
        weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(width), -1)
        context = (weights @ v).transpose(1, 2).flatten(2)
        torch.testing.assert_close(attention(x)[0], context, atol=1e-6, rtol=1e-5)
        inner, down = block.intermediate(x), block.output.dense
        expected = F.linear(l_ff * inner, down.weight, down.bias)
        torch.testing.assert_close(down(inner), expected, atol=1e-6, rtol=1e-5)


def test_a_gated_ffn_has_the_product_scaled() -> None:
    model, adapter = attached("llama")
    mlp: Any = model.model.layers[0].mlp
    l_ff = dict(adapter.named_parameters())["model.layers.0.mlp.down_proj.input.l"]
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        inner = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
        expected = F.linear(l_ff * inner, mlp.down_proj.weight)
        torch.testing.assert_close(mlp(x), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("gpt2", {"transformer.h.0.attn.c_attn.key": 32, "transformer.h.0.attn.c_attn.value": 32}),
        ("gpt_neox", {"gpt_neox.layers.0.attention.query_key_value.key": 32}),
        ("phi3", {"model.layers.0.self_attn.qkv_proj.key": 16}),
        ("bloom", {"transformer.h.0.self_attention.query_key_value.value": 32}),
        ("llama", {"model.layers.0.self_attn.k_proj": 16, "model.layers.0.self_attn.v_proj": 16}),
        (
            "t5",
            {
                "encoder.block.0.layer.0.SelfAttention.k": 32,
                "decoder.block.0.layer.0.SelfAttention.v": 32,
                "decoder.block.0.layer.1.EncDecAttention.k": 32,
                "decoder.block.0.layer.1.EncDecAttention.v": 32,
            },
        ),
    ],
)
def test_keys_and_values_are_scaled_and_queries_are_not(
    family: str, expected: dict[str, int]
) -> None:
    found = shapes(family, feedforward=())
    for place, width in expected.items():
        assert found[place] == (width,)
    assert not any("query" in p.rpartition(".")[2] or p.endswith(("q_proj", ".q")) for p in found)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "phi3", "bloom"])
def test_a_slice_of_a_fused_module_leaves_the_rest(family: str) -> None:
    model, adapter = attached(family, feedforward=())
    place: Any = adapter.grafts[0].place
    host = model.get_submodule(place.module)
    x = torch.randn(3, 32)
    with torch.no_grad():
        now = host(x)
        with gt.using(model, None):
            base = host(x)
    own = [g for g in adapter.grafts if g.place.module == place.module]
    scales = torch.ones(base.shape[-1])
    for graft in own:
        at = torch.cat([torch.arange(*run) for run in graft.place.rows])  # type: ignore[union-attr]
        scales[at] = dict(graft.delta.named_parameters())["l"].detach()
    assert (scales == 1).sum() == base.shape[-1] - sum(
        t.numel() for g in own for _, t in g.tensors()
    )
    assert torch.equal(now, base * scales)


def test_each_expert_has_a_vector_of_its_own() -> None:
    model, adapter = attached("mixtral")
    experts: Any = model.model.layers[0].mlp.experts
    name = "model.layers.0.mlp.experts.down_proj"
    l_e = dict(adapter.named_parameters())[f"{name}.l"]
    assert l_e.shape == (experts.down_proj.shape[0], experts.down_proj.shape[2])
    twin: Any = FAMILIES["mixtral"].build()
    plain = twin.model.layers[0].mlp.experts
    with torch.no_grad():
        for expert, scales in enumerate(l_e):
            plain.down_proj[expert] *= scales[None, :]  # columns: what enters the expert's W2
        x, chosen = torch.randn(6, 32), torch.tensor([[0, 1]] * 3 + [[2, 3]] * 3)
        weights = torch.full((6, 2), 0.5)
        assert torch.equal(experts(x, chosen, weights), plain(x, chosen, weights))


def test_a_convolutions_channels_are_scaled() -> None:
    model, adapter = attached("vit", targets=("projection",), feedforward=())
    host = model.get_submodule(adapter.grafts[0].place.module)
    own = next(iter(adapter.parameters()))
    x = torch.randn(2, 3, 16, 16)
    expected = F.conv2d(x, host.weight, host.bias, host.stride) * own[:, None, None]
    torch.testing.assert_close(host(x), expected, atol=1e-6, rtol=1e-5)
    check_merges(model, "vit", "default")


def test_a_convolutions_input_channels_are_scaled() -> None:
    model, adapter = attached("vit", targets=(), feedforward=("projection",))
    assert next(adapter.parameters()).shape == (3,)
    check_merges(model, "vit", "default")


def test_all_start_at_one_and_count_as_the_formula() -> None:
    model = FAMILIES["t5"].build()
    adapter = gt.attach(model, gt.IA3())
    assert all(torch.equal(t, torch.ones_like(t)) for t in adapter.parameters())
    inner = model.config.d_ff
    assert adapter.count() == 2 * (2 * 32 + inner) + 2 * (4 * 32 + inner)


def test_every_vector_gets_a_gradient_and_learns() -> None:
    model = FAMILIES["llama"].build()
    adapter = gt.attach(model, gt.IA3())
    inputs = FAMILIES["llama"].inputs()
    optimizer = torch.optim.Adam(adapter.parameters(), lr=0.05)
    losses: list[float] = []
    for _ in range(15):
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        assert all(t.grad is not None and t.grad.any() for t in adapter.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("family", ["bert", "llama", "mixtral"])
def test_bf16_hosts_keep_their_dtype_and_start_as_they_were(family: str) -> None:
    model, inputs = FAMILIES[family].build(dtype=torch.bfloat16), FAMILIES[family].inputs()
    base = logits(model, inputs)
    adapter = gt.attach(model, gt.IA3(train_head=False))
    assert {t.dtype for t in adapter.parameters()} == {torch.float32}
    now = logits(model, inputs)
    assert now.dtype is torch.bfloat16
    assert torch.equal(now, base)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "phi3", "t5"])
@pytest.mark.parametrize("order", [("scales", "other"), ("other", "scales")])
@pytest.mark.parametrize(
    "other", [gt.LoRA(r=2, lora_bias=True), gt.BitFit(add_missing=True), gt.IA3()]
)
def test_a_stack_merged_is_the_stack(family: str, order: tuple[str, str], other: gt.Method) -> None:
    if family in ("llama", "phi3", "t5"):  # no biases to merge into
        other = gt.LoRA(r=2) if isinstance(other, gt.LoRA | gt.BitFit) else other
    model = FAMILIES[family].build()
    shake(gt.attach(model, gt.IA3(), "scales"), seed=1, noise=0.3)
    shake(gt.attach(model, other, "other"), seed=2, noise=0.1)
    stack = gt.Stack(*order)
    gt.activate(model, stack)
    check_merges(model, family, stack)


def test_experts_in_a_stack_merge_as_they_run() -> None:
    for order in (("scales", "other"), ("other", "scales")):
        model = FAMILIES["mixtral"].build()
        shake(gt.attach(model, gt.IA3(), "scales"), seed=1, noise=0.3)
        shake(gt.attach(model, gt.LoRA(r=2), "other"), seed=2, noise=0.1)
        gt.activate(model, gt.Stack(*order))
        check_merges(model, "mixtral", gt.Stack(*order))


def check_merges(model: nn.Module, family: str, names: Any) -> None:
    """Checks that merging changes no answer, and unmerging restores every bit."""
    inputs, before = FAMILIES[family].inputs(), tensors(model)
    expected = logits(model, inputs)
    with gt.using(model, None):
        assert (logits(model, inputs) - expected).abs().max() > 1e-3
    gt.merge(model, names)
    found = logits(model, inputs)
    assert (found - expected).abs().max() <= 1e-5 * max(1.0, expected.abs().max().item())
    gt.unmerge(model)
    assert same(tensors(model), before)
    assert torch.equal(logits(model, inputs), expected)


def test_layers_and_exclusions_hold_on_both_sides() -> None:
    found = shapes("bert", layers=1, exclude=("value",))
    at = "bert.encoder.layer.1"
    assert list(found) == [f"{at}.attention.self.key", f"{at}.output.dense.input"]


@pytest.mark.parametrize(
    ("family", "settings", "kind", "words"),
    [
        ("bert", {"targets": (), "feedforward": ()}, SettingsError, "both empty"),
        ("bert", {"targets": "keys"}, AnatomyError, 'Did you mean "key"'),
        ("bert", {"feedforward": "word_embeddings"}, SettingsError, "its input is ids"),
        ("phi3", {"feedforward": "up"}, SettingsError, 'as by feedforward="gate_up_proj"'),
        ("mixtral", {"targets": "up"}, SettingsError, "name it in feedforward"),
    ],
)
def test_what_cannot_be_scaled_is_refused(
    family: str, settings: dict[str, Any], kind: type[GraftuneError], words: str
) -> None:
    model = FAMILIES[family].build()
    with pytest.raises(kind, match=words):
        gt.attach(model, gt.IA3(**settings))
    assert gt.adapters(model) == {}


def test_a_whole_fused_module_may_have_its_input_scaled() -> None:
    assert shapes("phi3", targets=(), feedforward="gate_up_proj") == {
        f"model.layers.{i}.mlp.gate_up_proj.input": (32,) for i in range(2)
    }
