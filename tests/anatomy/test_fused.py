"""The rows said to belong to a role are those the model itself takes for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface

from graftune.anatomy import Projection, anatomy
from tests.families import FAMILIES, Family

FUSED_ATTENTION = ("modernbert", "gpt2", "gpt_neox", "bloom", "phi3")
FUSED_FEED_FORWARD = ("modernbert", "phi3", "mixtral")


def tensor(model: torch.nn.Module, projection: Projection) -> Tensor:
    return model.get_parameter(projection.path)


def scale_rows(model: torch.nn.Module, projection: Projection, factor: float) -> None:
    """Multiplies the role's rows of weight and bias."""
    host = model.get_submodule(projection.module)
    weight = tensor(model, projection)
    with torch.no_grad():
        for start, stop in projection.rows or ():
            if type(host).__name__ == "Conv1D" or weight.ndim == 3:
                weight[:, start:stop] *= factor
            else:
                weight[start:stop] *= factor
            if getattr(host, "bias", None) is not None:
                host.bias[start:stop] *= factor


def fused(family: Family, model: Any, kind: str) -> dict[str, Projection]:
    spans = [span for span in anatomy(model).blocks[0].spans if span.kind == kind]
    return {p.role: p for p in spans[0].projections if p.is_fused}


@pytest.mark.parametrize("name", [*FUSED_ATTENTION, *FUSED_FEED_FORWARD])
def test_rows_of_all_roles_cover_the_module_once(name: str) -> None:
    model = FAMILIES[name].build(meta=True)
    for block in anatomy(model).blocks:
        modules: dict[str, list[Projection]] = {}
        for span in block.spans:
            for part in span.projections:
                modules.setdefault(part.path, []).append(part)
        for parts in (parts for parts in modules.values() if len(parts) > 1):
            rows = sorted(i for p in parts for a, b in p.rows or () for i in range(a, b))
            host = model.get_submodule(parts[0].module)
            outputs = getattr(host, "out_features", None) or getattr(host, "nf", None)
            outputs = outputs or tensor(model, parts[0]).shape[1]
            assert rows == list(range(outputs))


@pytest.mark.parametrize("name", [name for name in FUSED_ATTENTION if name != "bloom"])
@pytest.mark.parametrize("role", ["query", "key", "value"])
def test_scaling_a_role_scales_what_attention_receives(name: str, role: str) -> None:
    """Rotation and scores are linear in each of q, k, v alone, so exactly one of them doubles."""
    family = FAMILIES[name]
    before, after = (attention_inputs(family, name, role, factor) for factor in (1.0, 2.0))
    for this, old, new in zip(("query", "key", "value"), before, after, strict=True):
        expected = 2 * old if this == role else old
        assert torch.allclose(new, expected, atol=1e-6), this


def attention_inputs(family: Family, name: str, role: str, factor: float) -> list[Tensor]:
    """Returns q, k, v as the first block's attention function gets them."""
    model = family.build()
    seen: list[list[Tensor]] = []

    def watch(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **rest: Any
    ) -> Any:
        seen.append([query.clone(), key.clone(), value.clone()])
        heads = query.shape[1] // key.shape[1]
        scores = query @ key.repeat_interleave(heads, 1).transpose(-1, -2)
        mixed = scores.softmax(-1) @ value.repeat_interleave(heads, 1)
        return mixed.transpose(1, 2), None

    AttentionInterface.register("graftune_test", watch)
    scale_rows(model, fused(family, model, "attention")[role], factor)
    model.set_attn_implementation("graftune_test")
    with torch.no_grad():
        model(**family.inputs())
    return seen[0]


def test_bloom_splits_its_heads_at_these_rows() -> None:
    model = FAMILIES["bloom"].build()
    attention = model.transformer.h[0].self_attention
    rows = fused(FAMILIES["bloom"], model, "attention")
    hidden = torch.randn(2, 5, 32)
    fused_output = attention.query_key_value(hidden)
    split = dict(zip(("query", "key", "value"), attention._reshape(fused_output), strict=True))
    for role, part in rows.items():
        ours = torch.cat([fused_output[..., a:b] for a, b in part.rows or ()], dim=-1)
        ours = ours.view(2, 5, 4, 8).transpose(1, 2)
        assert torch.equal(ours, split[role].view(2, 4, 5, 8)), role


@pytest.mark.parametrize("name", FUSED_FEED_FORWARD)
def test_only_the_gate_passes_through_the_activation(name: str) -> None:
    """Doubling "up" doubles the feed-forward; doubling "gate" does not."""
    family = FAMILIES[name]
    outputs = {}
    for role in ("none", "up", "gate"):
        model = family.build()
        if role != "none":
            scale_rows(model, fused(family, model, "ffn")[role], 2.0)
        module = anatomy(model).blocks[0].spans[-1].module
        assert module is not None
        with torch.no_grad():
            outputs[role] = model.get_submodule(module)(torch.ones(1, 3, 32))
    assert torch.allclose(outputs["up"], 2 * outputs["none"], atol=1e-5)
    assert not torch.allclose(outputs["gate"], 2 * outputs["none"], atol=1e-3)


@pytest.mark.parametrize(
    ("settings", "layout"),
    [
        ({"new_decoder_architecture": True, "num_kv_heads": 2}, "interleaved"),
        ({"new_decoder_architecture": False, "multi_query": False}, "interleaved"),
        ({"new_decoder_architecture": False, "multi_query": True}, "contiguous"),
    ],
)
def test_falcon_layout_follows_its_settings(settings: dict[str, Any], layout: str) -> None:
    model = falcon(**settings)
    attention = model.transformer.h[0].self_attention
    output = attention.query_key_value(torch.randn(1, 5, 32))
    split = dict(zip(("query", "key", "value"), attention._split_heads(output), strict=True))
    for part in anatomy(model).blocks[0].spans[0].roles("query", "key", "value"):
        assert part.layout == layout
        ours = torch.cat([output[..., a:b] for a, b in part.rows or ()], dim=-1)
        theirs = split[part.role]
        if settings["new_decoder_architecture"] and part.role != "query":
            theirs = theirs[:, :, ::2]  # repeated for each of the two queries of a group
        assert torch.equal(ours, theirs.reshape(1, 5, -1)), part.role


def falcon(**settings: Any) -> Any:
    import transformers

    config = transformers.FalconConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, **settings
    )
    return transformers.FalconForCausalLM(config).eval()
