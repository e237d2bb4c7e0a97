"""Where token embeddings leave the module that makes them, on their way into the first block."""

from __future__ import annotations

from torch import nn

from graftune.anatomy.modules import GRAFTS, is_embedding, is_norm, leaf, parent, within
from graftune.anatomy.parts import Anatomy


def find_entrance(model: nn.Module, anatomy: Anatomy) -> str | None:
    """Returns the module whose output is the first stack's embedded tokens, as they enter it.

    BERT's `embeddings`, GPT-2's `drop`, LLaMA's `embed_tokens`. None where there are no tokens, or
    where a sum of tokens and positions leaves no module (OPT).
    """
    blocks = anatomy.blocks[0].path if anatomy.blocks else ""
    tokens = [p for p in anatomy.input_embeddings if is_embedding(model.get_submodule(p))]
    if not blocks or not tokens:
        return None
    near = [path for path in tokens if within(blocks, parent(path))]
    if near:
        return _last_before(model, near[0], blocks)
    home = parent(tokens[0])
    return None if any(within(block.path, home) for block in anatomy.blocks) else home


def _last_before(model: nn.Module, tokens: str, blocks: str) -> str | None:
    """Returns the last norm or dropout between embeddings and blocks, or the embeddings' module."""
    home = parent(tokens)
    children = [
        (f"{home}.{name}" if home else name, child)
        for name, child in model.get_submodule(home)._modules.items()
        if child is not None and name != GRAFTS
    ]
    names = [path for path, _ in children]
    between = children[names.index(tokens) + 1 :]
    stop = next((i for i, (path, _) in enumerate(between) if within(blocks, path)), len(between))
    ends = [
        path
        for at, (path, child) in enumerate(between)
        if (is_norm(child) and "emb" in leaf(path)) or (at < stop and isinstance(child, nn.Dropout))
    ]
    if ends:
        return ends[-1]
    return None if any(is_embedding(child) for _, child in between[:stop]) else tokens
