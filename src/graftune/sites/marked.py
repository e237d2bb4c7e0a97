"""Virtual tokens in the places of a marker, a token of the vocabulary that stands for each.

ids       x1  M  x2  M  M  x3          M the marker, as often as there are virtual tokens
tokens    x1  h1 x2  h2 h3 x3          h in order; the sequence keeps its length
"""

from __future__ import annotations

import torch
from torch import Tensor

from graftune.errors import AdapterError
from graftune.sites.woven import Woven


def filled(tokens: Tensor, ids: Tensor, marker: int, virtual: Woven, *, may_lack: bool) -> Tensor:
    """Returns embedded tokens with each row's virtual ones in the markers' places.

    Args:
        tokens: `(B, n, width)`.
        ids: of the tokens, `(B, n)`.
        marker: the token id that stands for a virtual token.
        virtual: of each row; one that has none keeps its tokens.
        may_lack: whether a row may hold no marker, as where it goes on with a cache.

    Raises:
        AdapterError: a row holds more or fewer markers than it has virtual tokens.
    """
    most = virtual.most
    length = ids.new_full((len(ids),), most) if virtual.lengths is None else virtual.lengths
    is_marker = (ids == marker) & (length > 0)[:, None]
    _check(is_marker.sum(1), length, marker, may_lack)
    order = is_marker.cumsum(1) - 1 + (most - length)[:, None]  # shorter ones end together
    at = order.clamp(0, most - 1)[..., None].expand(-1, -1, tokens.shape[2])
    return torch.where(is_marker[..., None], virtual.prompt.gather(1, at).to(tokens.dtype), tokens)


def _check(count: Tensor, length: Tensor, marker: int, may_lack: bool) -> None:
    is_wrong = (count != length) & (length > 0) & ((count > 0) | (not may_lack))
    if is_wrong.any():
        row = int(is_wrong.int().argmax())
        raise AdapterError(
            f"Row {row} holds the marker {marker} {int(count[row])} times, expected "
            f"{int(length[row])}, one for each virtual token: look whether the text was cut off; "
            f"where the model itself wrote one, generate with suppress_tokens=[{marker}]."
        )
