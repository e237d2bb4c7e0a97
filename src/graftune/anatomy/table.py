"""What structure can't tell, per model type. Everything else is discovered; keep this small.

Tests check the entries against the models' own code: orders by tracing a forward, layouts by
splitting a module's output as the model does.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from graftune.anatomy.parts import Order, Role


def _by(setting: str, yes: Order, no: Order) -> Callable[[Any], Order]:
    def choose(config: Any) -> Order:
        return yes if getattr(config, setting, True) else no

    return choose


ORDERS: dict[str, Order | Callable[[Any], Order]] = {
    **dict.fromkeys(
        ("albert", "bart", "blenderbot-small", "distilbert", "fsmt", "funnel", "gte"), "post"
    ),
    **dict.fromkeys(
        ("jina_embeddings_v3", "led", "marian", "mvp", "nomic_bert", "plbart", "prophetnet"), "post"
    ),
    "trocr": "post",
    "gpt_neox": _by("use_parallel_residual", "parallel", "pre"),
    "opt": _by("do_layer_norm_before", "pre", "post"),
}
"""Where norms sit, for types whose names and counts of norms mislead or don't say."""

RUN_ORDER: tuple[tuple[str, ...], ...] = (
    (
        "input_layernorm",
        "post_self_attn_layernorm",
        "post_attention_layernorm",
        "post_mlp_layernorm",
    ),
    ("input_layernorm", "post_norm1", "post_attention_layernorm", "post_norm2"),
    ("operator_norm", "post_operator_norm", "ffn_norm", "post_ffn_norm"),
)
"""Names of a block's norms in the order they run, where the block registers them in another."""

PATCH_PROMPTS = (
    *("vit", "vit_msn", "deit", "beit", "dinov2", "dinov2_with_registers"),
    *("clip", "clip_vision_model"),
)
"""Types whose blocks take tokens among the patches of an image as they come."""
HIDDEN_PROMPTS = ("bert", "roberta", "xlm-roberta", *PATCH_PROMPTS)
"""Types whose blocks take tokens behind the embedding layer as they come: positions are in what
that layer answers, and nothing after it counts them."""

TEXT_TOWERS = ("clip", "clip_text_model")
"""Types whose text body takes ids alone, and pools the token whose id says that the text ends."""

OWN_SOFTMAX = ("bloom", "deberta-v2")
"""Types whose attentions ask no attention function, and compute softmax as `sites.softmax` sees."""

Cell = tuple[tuple[Role, int], ...]
"""Roles with their relative sizes, in the order in which a fused module repeats them."""
Layout = tuple[int, Cell]
"""How often a cell is repeated, and the cell."""
Get = Callable[..., int]
"""Looks a setting up by its names in a module, its config or the model's."""

_QKV: Cell = (("query", 1), ("key", 1), ("value", 1))


def _by_head(get: Get) -> Layout:
    return get("num_heads", "num_attention_heads", "n_head"), _QKV


def _falcon(get: Get) -> Layout | None:
    heads, groups = get("num_heads"), get("num_kv_heads")
    if get("new_decoder_architecture"):
        return groups, (("query", heads // groups), ("key", 1), ("value", 1))
    return None if get("multi_query") else _by_head(get)


def _bigcode(get: Get) -> Layout | None:
    return None if get("multi_query") else _by_head(get)


def _codegen(get: Get) -> Layout:
    return 4, (("query", 1), ("value", 1), ("key", 1))


def _latent(get: Get) -> Layout:
    sizes = get("qk_nope_head_dim"), get("v_head_dim")
    return get("num_heads", "num_attention_heads"), (("key", sizes[0]), ("value", sizes[1]))


LAYOUTS: dict[str, Callable[[Get], Layout | None]] = {
    "bloom": _by_head,
    "codegen": _codegen,
    "deberta": _by_head,
    "falcon": _falcon,
    "fuyu": _by_head,
    "gpt_bigcode": _bigcode,
    "gpt_neox": _by_head,
    "gpt_neox_japanese": _by_head,
    "kv_b_proj": _latent,
    "minimax": _by_head,
    "persimmon": _by_head,
}
"""Fused attentions (by model type or module name) that repeat their roles; others are in runs."""

NAMES: dict[str, dict[str, tuple[Role, ...]]] = {
    "deberta": {"in_proj": ("query", "key", "value")},
}
"""Names of attention inputs that mean something else in other types (`in_proj` in Mamba)."""

UP_FIRST = frozenset({"moonshine", "moonshine_streaming"})
"""Types whose fused feed-forward has the half without activation first."""

EVERY_OTHER_ROW = frozenset({"gpt_oss", "openai_privacy_filter"})
"""Types whose fused experts alternate gate and up, row by row."""

ADDS_RESIDUAL = frozenset({"bloom"})
"""Types whose attention and feed-forward modules take the residual and add it themselves."""

PRETRAINED_HEADS: dict[str, tuple[str, ...]] = {"modernbert": ("head",)}
"""Modules outside the body that a task class takes over from pretraining."""

READ_BY_PARENT = frozenset({"rel_embeddings"})
"""Names of modules whose tensors their parent reads, without ever running them (DeBERTa)."""

ONCE_FOR_ALL_ROWS: dict[str, tuple[str, ...]] = {
    "deberta": ("encoder.LayerNorm", "encoder.rel_embeddings"),
    "deberta-v2": ("encoder.LayerNorm", "encoder.rel_embeddings"),
}
"""Ends of the paths of modules that see one input for all rows of a batch."""

OF_POSITIONS = re.compile(
    r"relative_(attention|position)_bias|pos_(key|query)_proj|wpe|(\w*_)?pos(itions?)?(_emb\w*)?"
)
"""Names of modules, in any type, that see positions and not rows (T5, Swin, DeBERTa; tables)."""

WINDOWED = frozenset({"donut-swin", "maskformer-swin", "swin", "swinv2"})
"""Types whose attention sees windows of the image, so that what its answer is added to has another
shape."""

RESIDUAL_IS_NORMED = "apply_residual_connection_post_layernorm"
"""Attribute of blocks that, if true, add an answer to what its norm gives, not to what it sees
(BLOOM's)."""

WIDTHS = frozenset(
    {
        "hidden_size",
        "d_model",
        "n_embd",
        "dim",
        "embedding_size",
        "word_embed_proj_dim",
        "d_kv",
        "head_dim",
        "query_pre_attn_scalar",
        "rotary_dim",
        "intermediate_size",
        "d_ff",
        "n_inner",
        "hidden_dim",
        "ffn_dim",
        "encoder_ffn_dim",
        "decoder_ffn_dim",
        "moe_intermediate_size",
        "shared_expert_intermediate_size",
        "pooler_hidden_size",
        "pooler_output_size",
    }
)
"""Settings of a config that are widths of hidden states, heads or feed-forwards."""

HEADS = frozenset(
    {
        "num_attention_heads",
        "n_head",
        "n_heads",
        "num_heads",
        "encoder_attention_heads",
        "decoder_attention_heads",
    }
)
"""Settings that say how many heads a hidden state is cut into, where no width of a head is set."""

DEPTHS = frozenset(
    {
        "num_hidden_layers",
        "n_layer",
        "n_layers",
        "num_layers",
        "num_decoder_layers",
        "encoder_layers",
        "decoder_layers",
    }
)
"""Settings that are numbers of blocks."""
