"""Attention whose weights are computed again in the backward pass, where no kernel does so."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint


class AttendAgain(TorchFunctionMode):
    """Within it, attention with a trained bias keeps its inputs alone.

    No fused kernel has a gradient for the bias that is added to the scores (T5's relative
    positions), so torch falls back to one that keeps all weights, `(batch, heads, queries,
    keys)`: in a narrow network they outweigh all else that is kept.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = dict(kwargs or {})
        bias: Tensor | None = given.get("attn_mask")
        if func is not F.scaled_dot_product_attention or bias is None or not bias.requires_grad:
            return func(*args, **given)
        random = bool(given.get("dropout_p"))
        return checkpoint(func, *args, use_reentrant=False, preserve_rng_state=random, **given)
