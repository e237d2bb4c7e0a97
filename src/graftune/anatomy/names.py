"""The words Hugging Face models use for a role, so that a module's name tells what it does."""

from __future__ import annotations

import re
from collections.abc import Sequence

from graftune.anatomy.parts import Role

QKV: tuple[Role, ...] = ("query", "key", "value")


def _words(*words: str) -> re.Pattern[str]:
    return re.compile("|".join(words))


ATTENTION: tuple[tuple[re.Pattern[str], tuple[Role, ...]], ...] = (
    (
        _words(
            "query_key_value", "qkv(_proj|_linear)?", "c_attn", "[Ww]_?qkv", "att_proj", "W_pack"
        ),
        QKV,
    ),
    (_words("qk_proj"), ("query", "key")),
    (_words("key_value(_proj)?", "(to_)?kv(_proj|_linear)?", "kv_b_proj"), ("key", "value")),
    (
        _words(
            "q(_proj|_lin|_linear|_attn|_a_proj|_b_proj|_a|_b|_head)?",
            "query(_proj|_layer|_global|_linear)?",
            "[wW]q(_a|_b)?",
            "(linear|proj|project|to|in_proj|lin)_q(uery)?",
        ),
        ("query",),
    ),
    (
        _words(
            "k(_proj|_lin|_linear|_head)?",
            "key(_proj|_layer|_global|_linear)?",
            "[wW]k",
            "(linear|proj|project|to|in_proj|lin)_k(ey)?",
            "kv_a_proj_with_mqa",
            "kv_a_proj",
        ),
        ("key",),
    ),
    (
        _words(
            "v(_proj|_lin|_linear|_head)?",
            "value(_proj|_layer|_global|_linear)?",
            "[wW]v",
            "(linear|proj|project|to|in_proj|lin)_v(alue)?",
        ),
        ("value",),
    ),
)
"""Leaf names of an attention's inputs, fused ones first, with the roles in the module's order."""

OUTPUT = _words(
    "(o|out)(_proj|_lin|_linear|_layer|_b_proj)?",
    "[Ww][_]?o",
    "c_proj",
    "dense",
    "proj",
    "project_o(ut)?",
    "attention_out",
    "to_out",
    "linear_out",
    "attn_out",
    "attention_output",
    "post_proj",
    "out_linear",
    "output",
)

FEED_FORWARD: tuple[tuple[re.Pattern[str], tuple[Role, ...]], ...] = (
    (
        _words("gate_up_proj", "gate_and_up_proj", "Wi", "up_gate_proj", "input_linear"),
        ("gate", "up"),
    ),
    (_words("gate_proj", "wi_0", "gate_linear", "gate", "proj_up_gate"), ("gate",)),
    (
        _words(
            "(up|fc)_proj",
            "up",
            "fc_?1",
            "c_fc",
            "wi(_1)?",
            "lin(ear)?_?1",
            "dense_h_to_4h",
            "fc_in",
            "w_?3",
            "intermediate_dense",
            "intermediate",
            "up_linear",
            "layer_1",
            "ffn",
            "w_in",
            "dense_?1",
            "proj_up",
        ),
        ("up",),
    ),
    (
        _words(
            "down_proj",
            "down",
            "fc_?2",
            "c_proj",
            "[wW]o",
            "lin(ear)?_?2",
            "dense_4h_to_h",
            "fc_out",
            "w_?2",
            "output_dense",
            "output",
            "down_linear",
            "layer_2",
            "ffn_output",
            "w_out",
            "dense_?2",
            "proj_down",
            "output_linear",
        ),
        ("down",),
    ),
)
"""Leaf names of a feed-forward; `w1` is a gate where there is a `w3`, else up."""

CROSS = re.compile(r"cross|encoder_attn|encdec|enc_dec|encoder_decoder|inter_attention", re.I)
"""What the path of a cross-attention holds."""

TASKS = re.compile(
    r"For\w*(Sequence|Token|Image|Audio|Video|Text|FrameC|AudioFrame|Document)\w*Classification"
    r"|For\w*QuestionAnswering|ForMultipleChoice|ForXVector|ForRegression|ForObjectDetection"
    r"|For\w*Segmentation|ForDepthEstimation|ForPrediction"
)
"""Classes whose head is made for a task, after pretraining."""


def roles_of(
    name: str, table: Sequence[tuple[re.Pattern[str], tuple[Role, ...]]]
) -> tuple[Role, ...]:
    """Returns the roles a leaf name stands for, () when it stands for none.

    Example:
        >>> roles_of("q_proj", ATTENTION)
        ('query',)
    """
    return next((roles for pattern, roles in table if pattern.fullmatch(name)), ())
