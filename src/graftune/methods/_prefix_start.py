"""Prefixes that start as what the base makes of real words (Li & Liang 2021, section 7.4).

    P_k, P_v = W_k h, W_v h        h what the attention sees of the words, as the base runs on them

In decoders that rotate keys they are those of its cache: rotated as at positions -m .. -1, so that
text, which begins at 0, answers as if it followed the words; or at 0 .. m - 1 where text is moved.
Encoders' and infixes' are taken before rotation, since those stand at no one place.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from graftune.anatomy import Projection
from graftune.errors import SettingsError
from graftune.methods._attentions import Attention
from graftune.sites.caches import keys_and_values
from graftune.sites.entrance import PositionTable


@torch.no_grad()
def activations(
    method: str,
    model: nn.Module,
    found: Sequence[Attention],
    tokens: Sequence[int],
    length: int,
    first: int | None,
) -> list[tuple[Tensor, Tensor]]:
    """Returns keys and values of tokens, `(length, kv)` each, for every attention.

    Args:
        method: whose errors they are.
        model: the base; adapters that act, act in it.
        found: the attentions.
        tokens: repeated or cut to the length.
        length: of the prefix.
        first: the position of its first token, where keys are rotated; None for no rotation.

    Raises:
        SettingsError: the model takes no token ids, or has fewer tokens.
    """
    base: Any = model
    table = base.get_input_embeddings()
    size = getattr(table, "num_embeddings", None)
    if size is None or getattr(base, "main_input_name", "input_ids") != "input_ids":
        raise SettingsError(f"{method}: init_tokens is for models that take token ids.")
    if max(tokens) >= size:
        raise SettingsError(
            f"{method}: init_tokens holds {max(tokens)}, and the model has {size} tokens."
        )
    chosen = [*tokens] * -(-length // len(tokens))
    ids = torch.tensor([chosen[:length]], device=table.weight.device)
    if first is not None and _rotates(base):
        at = torch.arange(first, first + length, device=ids.device)[None]
        kept = keys_and_values(base, {"input_ids": ids, "position_ids": at})
        return [kept[base.get_submodule(one.place.module).layer_idx] for one in found]
    wanted = {part.module for one in found for part in one.maps}
    seen = _outputs(base, ids, wanted)
    return [tuple(_rows(seen, part) for part in one.maps) for one in found]  # type: ignore[misc]


def _rotates(model: Any) -> bool:
    """Whether a model is a decoder that is told positions and has no table of them."""
    if model.config.is_encoder_decoder or not getattr(model.config, "use_cache", False):
        return False
    reads = inspect.signature(model.forward).parameters
    return {"position_ids", "past_key_values"} <= set(reads) and PositionTable.of(
        model
    ).limit is None


def _outputs(model: Any, ids: Tensor, modules: set[str]) -> dict[str, Tensor]:
    """Returns what modules answer while the base runs on ids, in eval mode."""
    seen: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(path).register_forward_hook(
            lambda _, args, output, path=path: seen.update({path: output.flatten(0, -2)})
        )
        for path in modules
    ]
    was_training = model.training
    model.eval()
    try:
        decoder = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
        model(input_ids=ids, **decoder)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    return seen


def _rows(seen: dict[str, Tensor], part: Projection) -> Tensor:
    output = seen[part.module]
    if part.rows is None:
        return output
    return torch.cat([output[:, start:stop] for start, stop in part.rows], dim=1)
