"""The caches of side networks: beside the trunk's, and moved with it."""

from __future__ import annotations

from typing import Any

from graftune.errors import AdapterError

MARK = "_graftune_sides"
"""Attribute of a trunk's cache: the caches of its sides, by adapter."""


def side_cache(cache: Any, name: str, config: Any, length: int) -> Any:
    """Returns the cache of an adapter's side that goes with a trunk's, a new one at first.

    Args:
        cache: the trunk's, this pass's tokens in it.
        name: the adapter's.
        config: of its side.
        length: how many tokens this pass has.

    Raises:
        AdapterError: the cache holds tokens that this adapter's side never saw.
    """
    held: dict[str, Any] = cache.__dict__.setdefault(MARK, {})
    if name not in held:
        seen = int(cache.get_seq_length()) - length
        if seen > 0:
            raise AdapterError(
                f'The cache holds {seen} tokens that the side of "{name}" did not see: start '
                "a new cache when the active adapter changes."
            )
        held[name] = _beside(cache, config)
    return held[name]


def join(cache: Any, side: Any) -> None:
    """Lets a trunk's cache reorder, crop and repeat the layers of a side's with its own."""
    for trunk_part, side_part in zip(_parts(cache), _parts(side), strict=True):
        known = {id(layer) for layer in trunk_part.layers}
        trunk_part.layers.extend(la for la in side_part.layers if id(la) not in known)


def _parts(cache: Any) -> tuple[Any, ...]:
    """Returns a cache, or those of self- and cross-attention that it is made of."""
    inner = getattr(cache, "self_attention_cache", None)
    return (cache,) if inner is None else (inner, cache.cross_attention_cache)


def _beside(cache: Any, config: Any) -> Any:
    """Returns an empty cache of the same kind as a trunk's."""
    from transformers import DynamicCache, EncoderDecoderCache, StaticCache

    if isinstance(cache, EncoderDecoderCache):
        return EncoderDecoderCache(*(_beside(part, config) for part in _parts(cache)))
    if isinstance(cache, StaticCache):
        layers: list[Any] = cache.layers
        longest = max(layer.max_cache_len for layer in layers)
        return StaticCache(config=config, max_cache_len=longest)
    return DynamicCache(config=config)
