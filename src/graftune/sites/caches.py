"""Caches in what a body answers, and what one keeps of tokens: keys and values, rotated."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

Kept = tuple[Tensor, Tensor]


def caches_in(output: Any) -> Iterator[Any]:
    """Yields the caches among what a body answers: one, or none."""
    values = output if isinstance(output, tuple | list) else dict(output).values()
    return (value for value in values if hasattr(value, "get_seq_length"))


@torch.no_grad()
def keys_and_values(body: nn.Module, given: dict[str, Any]) -> list[Kept]:
    """Returns what the cache holds of tokens, `(n, kv heads * D)` each, layer by layer.

    No window shortens it. The body runs in eval mode.

    Args:
        body: what takes ids or embeddings and keeps a cache.
        given: its arguments, of one row of n tokens.
    """
    from transformers import DynamicCache

    cache, was_training = DynamicCache(), body.training
    body.eval()
    try:
        body(**given, past_key_values=cache, use_cache=True)
    finally:
        body.train(was_training)
    layers: list[Any] = cache.layers
    return [(_flat(layer.keys), _flat(layer.values)) for layer in layers]


def has_windows(config: Any) -> bool:
    """Whether some layer's tokens see no more than the last ones."""
    from transformers import DynamicCache

    return any(getattr(layer, "is_sliding", False) for layer in DynamicCache(config=config).layers)


def _flat(states: Any) -> Tensor:
    return states[0].transpose(0, 1).flatten(1)  # (1, kv heads, n, D)
