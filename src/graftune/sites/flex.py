"""Masks of flex attention: functions of (row, head, query, key) with their blocks.

    visible(b, h, q, k) = k < m  or  own(b, h, q, k - m)          m columns in front, all seen

A block mask is the same object in every layer of a pass, so what is made of it is kept on it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    from graftune.sites.plan import RowsAt

Visible = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def is_block_mask(mask: Any) -> bool:
    """Whether a mask is flex attention's own kind."""
    return hasattr(mask, "mask_mod")


def longer(mask: BlockMask, length: int, seen: Tensor | None = None) -> BlockMask:
    """Returns a mask with `length` columns in front of its own.

    Args:
        mask: whose.
        length: of the columns.
        seen: which queries see them, `(1 or B, 1, q, length)`; None if all do.
    """
    own = mask.mask_mod
    if seen is None:

        def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (k < length) | own(b, h, q, (k - length).clamp(min=0))

        return _kept(mask, f"longer by {length}", visible, _rows(mask), length)
    rows, queries = max(_rows(mask), len(seen)), seen.shape[2]
    table = seen[:, 0].expand(rows, -1, -1)

    def seen_or_own(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        front = table[b, q.clamp(max=queries - 1), k.clamp(max=length - 1)]
        return torch.where(k < length, front, own(b, h, q, (k - length).clamp(min=0)))

    return _made(mask, seen_or_own, rows, length)


def of_rows(mask: BlockMask, at: RowsAt) -> BlockMask:
    """Returns the mask of some rows of the batch."""
    batch = _rows(mask)
    if batch == 1:
        return mask
    own, device = mask.mask_mod, mask.kv_num_blocks.device
    rows = torch.arange(batch, device=device)[at] if isinstance(at, slice) else at

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return own(rows[b], h, q, k)

    return _kept(mask, f"rows {rows.tolist()}", visible, len(rows), 0)


def _rows(mask: BlockMask) -> int:
    return int(mask.kv_num_blocks.shape[0])


def _kept(mask: BlockMask, name: str, visible: Visible, rows: int, length: int) -> BlockMask:
    made: dict[str, BlockMask] = mask.__dict__.setdefault("_graftune", {})
    if name not in made:
        made[name] = _made(mask, visible, rows, length)
    return made[name]


def _made(mask: BlockMask, visible: Visible, rows: int, length: int) -> BlockMask:
    from torch.nn.attention.flex_attention import create_block_mask

    device, (queries, keys) = mask.kv_num_blocks.device, mask.seq_lengths
    return create_block_mask(
        visible,
        rows,
        None if mask.kv_num_blocks.shape[1] == 1 else mask.kv_num_blocks.shape[1],
        queries,
        keys + length,
        device=str(device),
        _compile=device.type == "cuda",
    )
