"""The module that token embeddings leave by, held against what the first block is given."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import graftune as gt
from graftune.anatomy.entrance import find_entrance
from tests.families import FAMILIES

WITHOUT = {"opt": "adds positions to tokens", "whisper": "hears", "vit": "sees", "swin": "sees"}
EXPECTED = {
    "bert": "bert.embeddings",
    "distilbert": "distilbert.embeddings",
    "gpt2": "transformer.drop",
    "gpt_neox": "gpt_neox.emb_dropout",
    "bloom": "transformer.word_embeddings_layernorm",
    "llama": "model.embed_tokens",
    "t5": "encoder.embed_tokens",
    "bart": "model.encoder.layernorm_embedding",
    "clip": "text_model.embeddings",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_leaves_it_enters_the_first_block(family: str) -> None:
    kind = FAMILIES[family]
    model = kind.build()
    parts = gt.anatomy(model)
    path = find_entrance(model, parts)
    assert (path is None) == (family in WITHOUT)
    if path is None:
        return
    assert EXPECTED.get(family, path) == path
    left, entered = list[Tensor](), list[Tensor]()

    def leave(_: Any, __: Any, output: Tensor) -> None:
        left.append(output)

    def enter(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        entered.append(args[0] if args else kwargs["hidden_states"])

    model.get_submodule(path).register_forward_hook(leave)
    first = model.get_submodule(parts.blocks[0].path)
    first.register_forward_pre_hook(enter, with_kwargs=True)
    with torch.no_grad():
        model(**kind.inputs())
    assert len(left) == len(entered) == 1
    assert torch.equal(left[0], entered[0])
