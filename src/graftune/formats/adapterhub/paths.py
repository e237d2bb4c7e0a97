"""What AdapterHub calls the places of the models whose names are known here, for writing.

like BERT   attention.output, output                    beside dense and the norm
others      attention_adapters, output_adapters         in the block
T5          layer.N                                     the N-th sublayer
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from graftune.anatomy import Anatomy
from graftune.anatomy.modules import is_in
from graftune.anatomy.parts import Block, Projection

LIKE_BERT = ("bert", "electra", "roberta", "xlm-roberta")
LIKE_GPT2 = ("gpt2", "llama", "mistral")
LIKE_T5 = ("mt5", "t5")
VIT = "vit"
KNOWN = (*LIKE_BERT, *LIKE_GPT2, *LIKE_T5, VIT)
"""Model types whose names are known."""

_VIT_LAYERS = re.compile(r"(^|\.)layers\.")
_VIT_LINEARS = {
    "query": "attention.attention.query",
    "key": "attention.attention.key",
    "value": "attention.attention.value",
    "up": "intermediate.dense",
    "down": "output.dense",
}
_TURNED = ("llama", "mistral")
"""Types whose last linear of the feed-forward is called the intermediate one, and the second
linear the output."""


def feed_flags(model_type: str) -> dict[str, str]:
    """Returns the settings that stand for the linears of a feed-forward, by role."""
    if model_type in _TURNED:
        return {"down": "intermediate_lora", "up": "output_lora"}
    return {"up": "intermediate_lora", "down": "output_lora"}


def bottleneck_home(anatomy: Anatomy, block: Block, kind: str) -> str | None:
    """Returns what a bottleneck's tensors hang on; None where AdapterHub has no such place."""
    path, kinds = _block(anatomy, block), [span.kind for span in block.spans]
    if anatomy.model_type in LIKE_T5:
        return f"{path}.layer.{kinds.index(kind)}"
    if kind == "cross-attention":
        return f"{path}.crossattention.output" if anatomy.model_type in LIKE_BERT else None
    if anatomy.model_type in LIKE_BERT:
        return f"{path}.attention.output" if kind == "attention" else f"{path}.output"
    if kind == "attention":
        return f"{path}.attention_adapters"
    within = "output." if anatomy.model_type == VIT else ""
    return f"{path}.{within}output_adapters"


def body(model: Any) -> str:
    """Returns what the names of a model's tensors below its body begin with: "bert.", "" for it."""
    return "" if model.base_model is model else f"{model.base_model_prefix}."


def linear_home(anatomy: Anatomy, block: Block, part: Projection) -> str:
    """Returns what a linear's tensors hang on."""
    if anatomy.model_type == VIT:
        return f"{_block(anatomy, block)}.{_VIT_LINEARS[part.role]}"
    return part.module


def attention_home(anatomy: Anatomy, module: str) -> str:
    """Returns what the gates of an attention's prefix hang on."""
    if anatomy.model_type != VIT:
        return module
    block = next(block for block in anatomy.blocks if is_in(module, (block.path,)))
    return f"{_block(anatomy, block)}.attention.attention"


def reft_home(anatomy: Anatomy, block: Block) -> str:
    """Returns what the interventions of a block hang on."""
    return f"{_block(anatomy, block)}.reft_layer"


def left_out(anatomy: Anatomy, names: Collection[str]) -> list[int]:
    """Returns the blocks in which none of some modules or sublayers is, by index."""
    return [
        block.index
        for block in anatomy.blocks
        if not any(is_in(name, (block.path,)) for name in names)
    ]


def _block(anatomy: Anatomy, block: Block) -> str:
    if anatomy.model_type == VIT:
        return _VIT_LAYERS.sub(r"\1encoder.layer.", block.path)
    return block.path
