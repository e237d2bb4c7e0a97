"""Caches of a fixed size that hold a prompt: their room, and the masks that `generate` makes.

    without a prompt    generate: mask (B, n) ── (B, 1, tokens, room) ──> model
    with one            generate: mask (B, n) ──> body: (B, M + n) ── (B, 1, tokens, room + M)

For such caches `generate` makes the masks of attentions itself, before the forward, of the text
alone. Under a prompt it is given back the mask of tokens, so that the body makes them, prompt and
all. The room grows by the prompt as it comes in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

MAKER = "create_masks_for_generate"
"""What `generate` asks a model for the masks that it makes itself."""
ROOM = "_graftune_room"
"""Attribute of a cache that was made larger: by how many tokens."""


class MaskMaker:
    """A model's maker of masks with another in its place, until `remove`."""

    def __init__(self, model: nn.Module, maker: Callable[..., Any]) -> None:
        self.model = model
        self.before: Callable[..., Any] = getattr(model, MAKER, None) or _maker()
        model.__dict__[MAKER] = maker

    def remove(self) -> None:
        """Gives the model its own again."""
        self.model.__dict__.pop(MAKER, None)


def make_room(cache: Any, config: Any, more: int) -> None:
    """Lets an empty cache of fixed size hold more tokens; others grow by themselves.

    Args:
        cache: the body's, or None.
        config: the body's, which says how far each layer looks back.
        more: tokens of the prompt.
    """
    from transformers import StaticCache

    own, more = _own(cache), more - getattr(_own(cache), ROOM, 0)
    layers = [layer for layer in _layers(own) if hasattr(layer, "max_cache_len")]
    if not layers or more <= 0:
        return
    for at, layer in enumerate(own.layers):
        if layer in layers:
            larger: Any = StaticCache(config, layer.max_cache_len + more).layers[at]
            layer.max_cache_len = larger.max_cache_len
            layer.is_initialized = False  # its tensors are made as it is first written to
    setattr(own, ROOM, more + getattr(own, ROOM, 0))


def fitted(mask: Tensor, cache: Any) -> Tensor:
    """Returns a mask of tokens of the length of a cache's room, `(B, room)`, if that is fixed."""
    whole = [layer for layer in _layers(_own(cache)) if not layer.is_sliding]
    room = max([0, *(getattr(layer, "max_cache_len", 0) for layer in whole)])
    return F.pad(mask, (0, max(0, room - mask.shape[1])))


def _maker() -> Callable[..., Any]:
    from transformers.masking_utils import create_masks_for_generate

    return create_masks_for_generate


def _own(cache: Any) -> Any:
    """Returns the part of a cache that holds the tokens that go into the body themselves."""
    return getattr(cache, "self_attention_cache", cache)


def _layers(cache: Any) -> list[Any]:
    return list(cache.layers) if getattr(cache, "is_compileable", False) else []
