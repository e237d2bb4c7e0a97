"""The 24 families resolve to exactly these names, written down by reading the models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from graftune.anatomy import Anatomy, Span, anatomy
from tests.families import FAMILIES

BERT = (
    "post",
    "attention None query=attention.self.query key=attention.self.key value=attention.self.value"
    " output=attention.output.dense | attention.output.LayerNorm",
    "ffn None up=intermediate.dense down=output.dense | output.LayerNorm",
)
LLAMA_ATTENTION = (
    "attention self_attn query=self_attn.q_proj key=self_attn.k_proj value=self_attn.v_proj"
    " output=self_attn.o_proj | input_layernorm"
)
LLAMA = (
    "pre",
    LLAMA_ATTENTION,
    "ffn mlp gate=mlp.gate_proj up=mlp.up_proj down=mlp.down_proj | post_attention_layernorm",
)
BART_ATTENTION = (
    "attention self_attn key=self_attn.k_proj value=self_attn.v_proj query=self_attn.q_proj"
    " output=self_attn.out_proj | self_attn_layer_norm"
)
BART_CROSS = (
    "cross-attention encoder_attn key=encoder_attn.k_proj value=encoder_attn.v_proj"
    " query=encoder_attn.q_proj output=encoder_attn.out_proj | encoder_attn_layer_norm"
)
BART_FEED_FORWARD = "ffn None up=fc1 down=fc2 | final_layer_norm"
T5_ATTENTION = (
    "attention layer.0.SelfAttention query=layer.0.SelfAttention.q key=layer.0.SelfAttention.k"
    " value=layer.0.SelfAttention.v output=layer.0.SelfAttention.o | layer.0.layer_norm"
)
T5_CROSS = (
    "cross-attention layer.1.EncDecAttention query=layer.1.EncDecAttention.q"
    " key=layer.1.EncDecAttention.k value=layer.1.EncDecAttention.v"
    " output=layer.1.EncDecAttention.o | layer.1.layer_norm"
)
VIT = (
    "pre",
    "attention attention query=attention.q_proj key=attention.k_proj value=attention.v_proj"
    " output=attention.o_proj | layernorm_before",
    "ffn mlp up=mlp.fc1 down=mlp.fc2 | layernorm_after",
)
CLIP = (
    "pre",
    BART_ATTENTION.replace("self_attn_layer_norm", "layer_norm1"),
    "ffn mlp up=mlp.fc1 down=mlp.fc2 | layer_norm2",
)
NEOX = (
    "query=attention.query_key_value[i] key=attention.query_key_value[i]"
    " value=attention.query_key_value[i] output=attention.dense"
)
NEOX_FEED_FORWARD = "ffn mlp up=mlp.dense_h_to_4h down=mlp.dense_4h_to_h | post_attention_layernorm"


def t5(decoder: bool, gated: bool) -> tuple[str, ...]:
    place = "layer.2" if decoder else "layer.1"
    first = f"gate={place}.DenseReluDense.wi_0 up={place}.DenseReluDense.wi_1"
    first = first if gated else f"up={place}.DenseReluDense.wi"
    feed = f"ffn {place}.DenseReluDense {first} down={place}.DenseReluDense.wo | {place}.layer_norm"
    return ("pre", T5_ATTENTION, *((T5_CROSS,) if decoder else ()), feed)


def bart(order: str) -> dict[str, tuple[str, ...]]:
    return {
        "encoder model.encoder.layers": (order, BART_ATTENTION, BART_FEED_FORWARD),
        "decoder model.decoder.layers": (order, BART_ATTENTION, BART_CROSS, BART_FEED_FORWARD),
    }


EXPECTED: dict[str, dict[str, tuple[str, ...]]] = {
    "bert": {"encoder bert.encoder.layer": BERT},
    "roberta": {"encoder roberta.encoder.layer": BERT},
    "electra": {"encoder electra.encoder.layer": BERT},
    "deberta-v2": {
        "encoder deberta.encoder.layer": (
            "post",
            BERT[1]
            .replace("query ", "query_proj ")
            .replace("key ", "key_proj ")
            .replace("self.value", "self.value_proj"),
            BERT[2],
        )
    },
    "distilbert": {
        "encoder distilbert.transformer.layer": (
            "post",
            "attention attention query=attention.q_lin key=attention.k_lin value=attention.v_lin"
            " output=attention.out_lin | sa_layer_norm",
            "ffn ffn up=ffn.lin1 down=ffn.lin2 | output_layer_norm",
        )
    },
    "modernbert": {
        "encoder model.layers": (
            "pre",
            "attention attn query=attn.Wqkv[c] key=attn.Wqkv[c] value=attn.Wqkv[c]"
            " output=attn.Wo | attn_norm",
            "ffn mlp gate=mlp.Wi[c] up=mlp.Wi[c] down=mlp.Wo | mlp_norm",
        )
    },
    "gpt2": {
        "decoder transformer.h": (
            "pre",
            "attention attn query=attn.c_attn[c] key=attn.c_attn[c] value=attn.c_attn[c]"
            " output=attn.c_proj | ln_1",
            "ffn mlp up=mlp.c_fc down=mlp.c_proj | ln_2",
        )
    },
    "gpt_neox": {
        "decoder gpt_neox.layers": (
            "parallel",
            f"attention attention {NEOX} | input_layernorm",
            NEOX_FEED_FORWARD,
        )
    },
    "opt": {"decoder model.decoder.layers": ("pre", BART_ATTENTION, BART_FEED_FORWARD)},
    "bloom": {
        "decoder transformer.h": (
            "pre",
            f"attention self_attention {NEOX.replace('attention.', 'self_attention.')}"
            " | input_layernorm",
            NEOX_FEED_FORWARD,
        )
    },
    "llama": {"decoder model.layers": LLAMA},
    "mistral": {"decoder model.layers": LLAMA},
    "qwen2": {"decoder model.layers": LLAMA},
    "qwen3": {
        "decoder model.layers": (
            "pre",
            f"{LLAMA_ATTENTION} | self_attn.q_norm self_attn.k_norm",
            LLAMA[2],
        )
    },
    "gemma2": {
        "decoder model.layers": (
            "sandwich",
            f"{LLAMA_ATTENTION} post_attention_layernorm",
            LLAMA[2].replace(
                "post_attention_layernorm", "pre_feedforward_layernorm post_feedforward_layernorm"
            ),
        )
    },
    "phi3": {
        "decoder model.layers": (
            "pre",
            "attention self_attn query=self_attn.qkv_proj[c] key=self_attn.qkv_proj[c]"
            " value=self_attn.qkv_proj[c] output=self_attn.o_proj | input_layernorm",
            "ffn mlp gate=mlp.gate_up_proj[c] up=mlp.gate_up_proj[c] down=mlp.down_proj"
            " | post_attention_layernorm",
        )
    },
    "mixtral": {
        "decoder model.layers": (
            "pre",
            LLAMA_ATTENTION,
            "ffn mlp gate=mlp.experts.gate_up_proj[c] up=mlp.experts.gate_up_proj[c]"
            " down=mlp.experts.down_proj | post_attention_layernorm",
        )
    },
    "t5": {"encoder encoder.block": t5(False, False), "decoder decoder.block": t5(True, False)},
    "mt5": {"encoder encoder.block": t5(False, True), "decoder decoder.block": t5(True, True)},
    "bart": bart("post"),
    "whisper": bart("pre"),
    "vit": {"vision vit.layers": VIT},
    "swin": {"vision swin.encoder.layers.0.blocks": VIT},
    "clip": {"text text_model.encoder.layers": CLIP, "vision vision_model.encoder.layers": CLIP},
}
"""Stacks by kind and path: order, then each span with its module, roles, norms and inner norms."""

AROUND: dict[str, tuple[str, str | None, str]] = {
    "bert": ("bert.embeddings.word_embeddings", None, "classifier!"),
    "roberta": ("roberta.embeddings.word_embeddings", None, "classifier!"),
    "electra": ("electra.embeddings.word_embeddings", None, "classifier!"),
    "deberta-v2": ("deberta.embeddings.word_embeddings", None, "pooler! classifier!"),
    "distilbert": ("distilbert.embeddings.word_embeddings", None, "pre_classifier! classifier!"),
    "modernbert": ("model.embeddings.tok_embeddings", None, "head classifier!"),
    "gpt2": ("transformer.wte", "lm_head", ""),
    "gpt_neox": ("gpt_neox.embed_in", "lm_head", ""),
    "opt": ("model.decoder.embed_tokens", "lm_head", ""),
    "bloom": ("transformer.word_embeddings", "lm_head", ""),
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "mixtral"),
        ("model.embed_tokens", "lm_head", ""),
    ),
    **dict.fromkeys(("t5", "mt5"), ("encoder.embed_tokens decoder.embed_tokens", "lm_head", "")),
    "bart": ("model.encoder.embed_tokens model.decoder.embed_tokens", "lm_head", ""),
    "whisper": ("model.encoder.conv1 model.decoder.embed_tokens", "proj_out", ""),
    "vit": ("vit.embeddings.patch_embeddings.projection", None, "classifier!"),
    "swin": ("swin.embeddings.patch_embeddings.projection", None, "classifier!"),
    "clip": (
        "text_model.embeddings.token_embedding vision_model.embeddings.patch_embedding",
        None,
        "",
    ),
}
"""Input embeddings, language-model head, heads (those marked ! are new)."""

WIDTHS = {"swin": (16, 16, 32, 32)}


def described(found: Anatomy) -> dict[str, tuple[str, ...]]:
    """Returns the last block of each stack in the words of EXPECTED."""
    return {
        f"{stack.kind} {stack.path}": (
            stack.blocks[-1].order,
            *(span_words(span, stack.blocks[-1].path) for span in stack.blocks[-1].spans),
        )
        for stack in found.stacks
    }


def span_words(span: Span, block: str) -> str:
    def short(path: str) -> str:
        return path.removeprefix(f"{block}.").removesuffix(".weight")

    roles = [
        f"{p.role}={short(p.path)}{f'[{p.layout[0]}]' if p.rows else ''}" for p in span.projections
    ]
    module = short(span.module) if span.module else "None"
    norms = [" ".join(short(norm) for norm in part) for part in (span.norms, span.inner_norms)]
    return " | ".join(part for part in (" ".join([span.kind, module, *roles]), *norms) if part)


@pytest.mark.parametrize("name", FAMILIES)
def test_family_has_exactly_these_parts(name: str) -> None:
    found = anatomy(FAMILIES[name].build(meta=True))
    assert described(found) == EXPECTED[name]
    assert found.missing == ()
    assert found.model_type == name


@pytest.mark.parametrize("name", FAMILIES)
def test_family_has_exactly_these_surroundings(name: str) -> None:
    model = FAMILIES[name].build(meta=True)
    found = anatomy(model)
    embeddings, output, heads = AROUND[name]
    assert found.input_embeddings == tuple(embeddings.split())
    assert found.output_embeddings == output
    assert found.heads == tuple(heads.replace("!", "").split())
    assert found.new_heads == tuple(head[:-1] for head in heads.split() if head.endswith("!"))
    names = [n for n, _ in model.named_parameters()]
    norms = {f"{norm}.bias" for norm in found.norms}
    assert norms & set(names) <= set(found.biases) <= {n for n in names if n.endswith(".bias")}


@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_are_counted_over_all_stacks(name: str) -> None:
    found = anatomy(FAMILIES[name].build(meta=True))
    assert [block.index for block in found.blocks] == list(range(len(found.blocks)))
    for stack in found.stacks:
        assert [block.position for block in stack.blocks] == list(range(len(stack.blocks)))
    widths = tuple(block.width for block in found.blocks)
    assert widths == WIDTHS.get(name, (32,) * len(widths))


@pytest.mark.parametrize("name", FAMILIES)
def test_only_bloom_adds_its_residual_inside(name: str) -> None:
    spans = [s for b in anatomy(FAMILIES[name].build(meta=True)).blocks for s in b.spans]
    assert {span.adds_residual for span in spans} == {name == "bloom"}
    assert {span.experts for span in spans} == ({True, False} if name == "mixtral" else {False})


@pytest.mark.parametrize("name", FAMILIES)
def test_order_is_what_a_forward_does(name: str) -> None:
    family = FAMILIES[name]
    model = family.build()
    seen = Seen(model)
    with torch.no_grad():
        model(**family.inputs())
    for block in anatomy(model).blocks:
        entering = seen.inputs[block.path]
        orders = [span_order(span, entering, seen) for span in block.spans]
        parallel = ["pre", "parallel"]  # nothing tells it of the attention alone
        expected = parallel if block.order == "parallel" else [block.order] * len(orders)
        assert orders == expected, block.path


@pytest.mark.parametrize(
    ("name", "setting", "order"),
    [
        ("opt", {"do_layer_norm_before": False}, "post"),
        ("gpt_neox", {"use_parallel_residual": False}, "pre"),
    ],
)
def test_order_follows_the_setting_that_changes_it(
    name: str, setting: dict[str, Any], order: str
) -> None:
    blocks = anatomy(FAMILIES[name].build(meta=True, **setting)).blocks
    assert {block.order for block in blocks} == {order}


class Seen:
    """What went into and out of each module in one forward, flattened to rows of features."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        for path, module in model.named_modules():
            module.register_forward_hook(self.keep(path), with_kwargs=True)

    def keep(self, path: str) -> Any:
        def hook(_: Any, args: Any, kwargs: Any, output: Any) -> None:
            given = [*args, kwargs.get("hidden_states")]
            first = next((value for value in given if isinstance(value, Tensor)), None)
            result = output[0] if isinstance(output, tuple) else output
            if isinstance(first, Tensor) and isinstance(result, Tensor):
                self.inputs[path], self.outputs[path] = first, result

        return hook


def span_order(span: Span, entering: Tensor, seen: Seen) -> str:
    """Returns the order that the tensors themselves show for one span."""
    first, last = span.projections[0], span.roles("output", "down")[0]
    leaving = seen.outputs[last.module if not span.experts else str(span.module)]
    if not span.norms:
        return "pre"
    if len(span.norms) == 2:
        return "sandwich" if same(seen.inputs[span.norms[1]], leaving) else "none"
    [norm] = span.norms
    fed_by_norm = same(seen.inputs[first.module], seen.outputs[norm])
    if span.kind == "cross-attention":
        query = span.roles("query")[0]
        fed_by_norm = same(seen.inputs[query.module], seen.outputs[norm])
    if not fed_by_norm:
        summed = seen.inputs[norm] - leaving.view_as(seen.inputs[norm])
        added_to = seen.inputs[first.module]
        if span.kind == "cross-attention":
            added_to = seen.inputs[span.roles("query")[0].module]
        return "post" if same(summed, added_to) else "none"
    reads_block_input = same(seen.inputs[norm], entering)
    return "parallel" if span.kind == "ffn" and reads_block_input else "pre"


def same(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors hold the same rows of features, in any order (Swin's windows)."""
    if left.numel() != right.numel():
        return False
    return torch.allclose(
        left.reshape(-1).sort().values, right.reshape(-1).sort().values, atol=1e-5
    )
