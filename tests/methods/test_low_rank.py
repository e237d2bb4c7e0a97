"""The equations of LoRA on every kind of host, against plain versions of the papers' formulas."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GptOssConfig, GptOssForCausalLM

import graftune as gt
from tests.contract.subjects import logits, shake
from tests.families import FAMILIES

SLICED = {
    "gpt2": "transformer.h.0.attn.c_attn",
    "gpt_neox": "gpt_neox.layers.0.attention.query_key_value",
    "phi3": "model.layers.0.self_attn.qkv_proj",
}


def attached(family: str, path: str, task: str = "default", **settings: Any) -> tuple[Any, Any]:
    """Returns a model's module, with a LoRA on it that is off its start, and the delta."""
    model = FAMILIES[family].build(task=task)  # type: ignore[arg-type]
    method = gt.LoRA(**{"r": 3, "alpha": 6, "targets": (path,), **settings})
    adapter = gt.attach(model, method, seed=0)
    shake(adapter, seed=1)
    host = model.get_submodule(path)
    return host, host.deltas["default"]


def weight_of(host: nn.Module) -> Tensor:
    """Returns a linear's or Conv1D's weight as (out, in)."""
    return host.weight.t() if type(host).__name__ == "Conv1D" else host.weight


def plain(x: Tensor, weight: Tensor, bias: Tensor | None, delta: Any, scale: float) -> Tensor:
    """Returns W x + b + s B (A x), one vector at a time."""
    rows = [
        weight @ row + scale * (delta.B @ (delta.A @ row)) for row in x.reshape(-1, x.shape[-1])
    ]
    y = torch.stack(rows).reshape(*x.shape[:-1], -1)
    return y if bias is None else y + bias


@pytest.mark.parametrize(
    ("family", "path"),
    [
        ("bert", "bert.encoder.layer.0.attention.self.query"),
        ("llama", "model.layers.1.mlp.down_proj"),
        ("gpt2", "transformer.h.0.attn.c_attn"),
        ("gpt2", "transformer.h.1.mlp.c_fc"),
    ],
)
@pytest.mark.parametrize("shape", [(5,), (2, 3), (2, 3, 4)])
def test_linear_is_the_equation(family: str, path: str, shape: tuple[int, ...]) -> None:
    host, delta = attached(family, path)
    x = torch.randn(*shape, weight_of(host).shape[1])
    expected = plain(x, weight_of(host), host.bias, delta, scale=2)
    torch.testing.assert_close(host(x), expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("family", ["bert", "gemma2"])
def test_embedding_is_the_equation_times_its_scale(family: str) -> None:
    path = {"bert": "bert.embeddings.word_embeddings", "gemma2": "model.embed_tokens"}[family]
    host, delta = attached(family, path)
    factor = float(getattr(host, "embed_scale", 1.0))
    assert (factor != 1) == (family == "gemma2")
    ids = torch.tensor([[3, 3, 98], [0, 41, 7]])
    own = [[host.weight[i] + 2 * delta.B @ delta.A[:, i] for i in row] for row in ids]
    expected = factor * torch.stack([torch.stack(row) for row in own])
    torch.testing.assert_close(host(ids), expected, atol=2e-6, rtol=1e-5)


def test_convolution_is_the_equation() -> None:
    host, delta = attached("vit", "vit.embeddings.patch_embeddings.projection")
    x = torch.randn(2, 3, 16, 16)
    size = host.kernel_size[0]
    change = torch.einsum("or,rchw->ochw", delta.B[:, :, 0, 0], delta.A)
    weight = (host.weight + 2 * change).flatten(1)
    patches = F.unfold(x, size, stride=host.stride)  # (2, 3 * size * size, patches)
    expected = (weight @ patches + host.bias[:, None]).reshape(host(x).shape)
    torch.testing.assert_close(host(x), expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("family", SLICED)
def test_slices_of_a_fused_module_change_alone(family: str) -> None:
    model = FAMILIES[family].build()
    path = SLICED[family]
    host = model.get_submodule(path)
    x = torch.randn(2, 3, weight_of(host).shape[1])
    base = host(x)
    span = gt.anatomy(model).blocks[0].spans[0]
    rows = {
        p.role: [i for run in p.rows or () for i in range(*run)]
        for p in span.roles("query", "value")
    }
    shake(gt.attach(model, gt.LoRA(r=3, alpha=6, targets="qv")), seed=1)
    changed = host(x)
    others = [i for i in range(base.shape[-1]) if i not in rows["query"] + rows["value"]]
    assert len(others) == len(rows["value"])
    assert torch.equal(changed[..., others], base[..., others])
    for role, at in rows.items():
        delta = host.deltas["default"][role]
        bias = None if host.bias is None else host.bias[at]
        expected = plain(x, weight_of(host)[at], bias, delta, scale=2)
        torch.testing.assert_close(changed[..., at], expected, atol=2e-6, rtol=1e-5)


def test_fused_module_asked_for_whole_has_one_matrix() -> None:
    host, delta = attached("gpt2", "transformer.h.0.attn.c_attn")
    assert delta.B.shape == (96, 3)
    assert list(host.deltas._modules) == ["output"]


@pytest.mark.parametrize("target", ["gate_up_proj", "down_proj"])
def test_experts_have_a_change_each(target: str) -> None:
    model = FAMILIES["mixtral"].build()
    shake(gt.attach(model, gt.LoRA(r=3, alpha=6, targets=(target,), layers=0)), seed=1)
    host = model.model.layers[0].mlp.experts
    site = host.deltas._modules["parameters"]
    delta = site._modules["default"]._modules[target]
    base = host._parameters[target]
    value = site.values(("default",), host)[target]
    for expert in range(4):
        expected = base[expert] + 2 * delta.B[expert] @ delta.A[expert]
        torch.testing.assert_close(value[expert], expected)
    assert host.__dict__.get(target) is None


def test_up_slice_of_experts_changes_alone() -> None:
    model = FAMILIES["mixtral"].build()
    shake(gt.attach(model, gt.LoRA(r=3, targets="up", layers=0)), seed=1)
    host = model.model.layers[0].mlp.experts
    base = host._parameters["gate_up_proj"]
    value = host.deltas._modules["parameters"].values(("default",), host)["gate_up_proj"]
    assert torch.equal(value[:, :80], base[:, :80])
    assert not torch.isclose(value[:, 80:], base[:, 80:]).all(-1).any()


def test_turned_experts_change_in_their_columns_and_are_counted_so() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 8, "num_local_experts": 4}
    shape = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    model: Any = GptOssForCausalLM(GptOssConfig(**sizes, **shape, vocab_size=99))
    method = gt.LoRA(r=3, alpha=6, targets="up")
    assert method.count(model, gt.anatomy(model)) == 4 * 3 * (32 + 48)
    shake(gt.attach(model, method), seed=1)
    host = model.model.layers[0].mlp.experts
    delta = host.deltas._modules["parameters"]._modules["default"]._modules["gate_up_proj"]
    base = host._parameters["gate_up_proj"]  # (experts, in, 2 * out), gate and up by turns
    expected = base.clone()
    expected[:, :, 1::2] += 2 * (delta.B @ delta.A).mT
    torch.testing.assert_close(delta(base, base), expected)


def test_doubling_alpha_doubles_the_change() -> None:
    path = "bert.encoder.layer.0.attention.self.query"
    changes = [attached("bert", path, alpha=a)[1].weight_change() for a in (6, 12)]
    assert torch.equal(changes[1], 2 * changes[0])


def test_rslora_is_sqrt_r_times_lora() -> None:
    path = "bert.encoder.layer.0.attention.self.query"
    plain_change = attached("bert", path, r=4)[1].weight_change()
    change = attached("bert", path, r=4, rslora=True)[1].weight_change()
    torch.testing.assert_close(change, math.sqrt(4) * plain_change)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_rank_of_the_change_is_at_most_r(family: str) -> None:
    model = FAMILIES[family].build()
    adapter = gt.attach(model, gt.LoRA(r=3))
    shake(adapter, seed=1)
    for graft in adapter.grafts:
        if graft.delta.rank is not None:
            assert torch.linalg.matrix_rank(graft.delta.weight_change()) == 3
    sites = [site for site in gt.summary(model).sites if site.kind != "head"]
    assert {site.rank for site in sites} == {3}


def test_dropout_falls_on_the_input_of_the_change_alone() -> None:
    path = "bert.encoder.layer.0.attention.self.query"
    host, delta = attached("bert", path, dropout=0.5)
    x = torch.randn(4, 32)
    expected = plain(x, host.weight, host.bias, delta, scale=2)
    torch.testing.assert_close(host(x), expected, atol=2e-6, rtol=1e-5)
    host.train()
    torch.manual_seed(5)
    dropped = host(x)
    torch.manual_seed(5)
    kept = F.dropout(x, 0.5)
    change = 2 * kept @ delta.A.t() @ delta.B.t()
    torch.testing.assert_close(dropped, F.linear(x, host.weight, host.bias) + change)


def test_dropout_follows_the_mode_of_the_model_it_joins() -> None:
    model = FAMILIES["bert"].build().train()
    gt.attach(model, gt.LoRA(dropout=0.5))
    assert all(m.training for m in model.modules())
    assert not any(m.training for m in model.eval().modules())


def test_embedding_has_no_dropout() -> None:
    host, _ = attached("bert", "bert.embeddings.word_embeddings", dropout=0.9)
    ids = torch.arange(9)
    calm = host(ids)
    assert torch.equal(host.train()(ids), calm)


def test_lora_bias_is_scaled_and_merges_into_the_bias() -> None:
    path = "bert.encoder.layer.0.attention.self.query"
    host, delta = attached("bert", path, lora_bias=True)
    x = torch.randn(4, 32)
    expected = plain(x, host.weight, host.bias, delta, scale=2) + 2 * delta.bias
    torch.testing.assert_close(host(x), expected, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(delta.bias_change(None), 2 * delta.bias)


def test_a_16_bit_host_has_32_bit_factors_and_its_own_output_type() -> None:
    model = FAMILIES["llama"].build(dtype=torch.bfloat16)
    adapter = gt.attach(model, gt.LoRA(r=3, alpha=6, targets=("q_proj",)))
    shake(adapter, seed=1)
    host: Any = model.model.layers[0].self_attn.q_proj
    x, delta = torch.randn(4, 32, dtype=torch.bfloat16), host.deltas["default"]
    assert delta.A.dtype == torch.float32
    base = F.linear(x, host.weight)
    change = 2 * x.float() @ delta.A.t() @ delta.B.t()
    assert torch.equal(host(x), base + change.to(torch.bfloat16))


def dora_weight(weight: Tensor, delta: Any, change: Tensor) -> Tensor:
    """Returns m * (W + s B A) / ||W + s B A||, row by row."""
    wide = weight + change
    rows = [m * row / row.flatten().norm() for m, row in zip(delta.m, wide, strict=True)]
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("family", "path"),
    [
        ("bert", "bert.encoder.layer.0.attention.self.query"),
        ("gpt2", "transformer.h.0.mlp.c_fc"),
    ],
)
def test_dora_on_a_linear_is_the_equation(family: str, path: str) -> None:
    host, delta = attached(family, path, dora=True)
    x = torch.randn(2, 3, 32)
    weight = dora_weight(weight_of(host), delta, 2 * delta.B @ delta.A)
    torch.testing.assert_close(host(x), F.linear(x, weight, host.bias), atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(delta.merged(weight_of(host), host), weight)


def test_dora_on_slices_is_the_equation_on_their_rows() -> None:
    model = FAMILIES["gpt_neox"].build()
    host: Any = model.gpt_neox.layers[0].attention.query_key_value
    shake(gt.attach(model, gt.LoRA(r=3, targets="value", dora=True)), seed=1)
    delta, x = host.deltas["default"], torch.randn(4, 32)
    at = delta.index
    weight = dora_weight(host.weight[at], delta, delta.B @ delta.A)
    expected = F.linear(x, weight, host.bias[at])
    torch.testing.assert_close(host(x)[:, at], expected, atol=2e-6, rtol=1e-5)


def test_dora_on_a_convolution_is_the_equation() -> None:
    host, delta = attached("vit", "vit.embeddings.patch_embeddings.projection", dora=True)
    x = torch.randn(2, 3, 16, 16)
    change = 2 * torch.einsum("or,rchw->ochw", delta.B[:, :, 0, 0], delta.A)
    expected = F.conv2d(x, dora_weight(host.weight, delta, change), host.bias, host.stride)
    torch.testing.assert_close(host(x), expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("family", ["bert", "gemma2"])
def test_dora_on_an_embedding_has_a_length_for_each_dimension(family: str) -> None:
    path = {"bert": "bert.embeddings.word_embeddings", "gemma2": "model.embed_tokens"}[family]
    host, delta = attached(family, path, dora=True)
    ids = torch.arange(9)
    table = dora_weight(host.weight.t(), delta, 2 * delta.B @ delta.A).t()
    expected = table[ids] * float(getattr(host, "embed_scale", 1.0))
    torch.testing.assert_close(host(ids), expected, atol=2e-6, rtol=1e-5)


def test_dora_starts_as_the_base_up_to_rounding() -> None:
    model = FAMILIES["bert"].build()
    inputs = FAMILIES["bert"].inputs()
    base = logits(model, inputs)
    adapter = gt.attach(model, gt.LoRA(dora=True))
    torch.testing.assert_close(logits(model, inputs), base, atol=1e-6, rtol=1e-6)
    lengths = {n: t for n, t in adapter.named_parameters() if n.endswith(".m")}
    path = "bert.encoder.layer.0.attention.self.query"
    torch.testing.assert_close(lengths[f"{path}.m"], model.get_submodule(path).weight.norm(dim=1))


def test_doras_norm_is_a_constant_in_the_backward_pass() -> None:
    host, delta = attached("bert", "bert.encoder.layer.0.attention.self.query", dora=True)
    x = torch.randn(4, 32)
    host(x).pow(2).sum().backward()
    A, B, m = (t.detach().clone().requires_grad_() for t in (delta.A, delta.B, delta.m))
    norm = (host.weight + 2 * B @ A).norm(dim=1).detach()
    weight = (m / norm)[:, None] * (host.weight + 2 * B @ A)
    F.linear(x, weight, host.bias).pow(2).sum().backward()
    for got, expected in ((delta.A, A), (delta.B, B), (delta.m, m)):
        torch.testing.assert_close(got.grad, expected.grad, atol=1e-4, rtol=1e-4)


def test_dora_drops_the_input_of_both_its_parts() -> None:
    host, delta = attached(
        "bert", "bert.encoder.layer.0.attention.self.query", dora=True, dropout=0.5
    )
    x = torch.randn(4, 32)
    host.train()
    torch.manual_seed(5)
    got = host(x)
    torch.manual_seed(5)
    kept = F.dropout(x, 0.5)
    weight = dora_weight(host.weight, delta, 2 * delta.B @ delta.A)
    expected = F.linear(x, host.weight, host.bias) + F.linear(kept, weight - host.weight)
    torch.testing.assert_close(got, expected, atol=3e-6, rtol=1e-5)
