"""The first and the last real tokens of each row, for deltas that act on these alone.

    padded left     . . 0 1 2 3 4        first 2: 0 1     last 1: 4
    padded right    0 1 2 3 4 . .
    with a cache    0 1 | 2              tokens are counted over the whole row, and what goes on
                                         with a cache has no last tokens: they were the prompt's

A token that is both is one of the last.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graftune.errors import AdapterError
from graftune.sites import masks


@dataclass(frozen=True)
class Chosen:
    """Some tokens of each row: a run that is the same in all, or each row's own.

    Attributes:
        run: half-open, where all rows are alike.
        index: `(rows, n)` int64, the numbers of n tokens.
        is_meant: `(rows, n)`, which of them are meant, where rows have fewer.
    """

    run: tuple[int, int] | None = None
    index: Any = None
    is_meant: Any = None

    def changed(self, h: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        """Returns h, `(rows, tokens, width)`, with the chosen tokens as `change` makes them."""
        if self.run is not None:
            start, stop = self.run
            return h.slice_scatter(change(h[:, start:stop]), 1, start, stop)
        index = self.index[..., None].expand(-1, -1, h.shape[2])
        old = h.gather(1, index)
        return h.scatter(1, index, torch.where(self.is_meant[..., None], change(old), old))


def ends(
    stack: str, h: Tensor, first: int, last: int, asks: str
) -> tuple[Chosen | None, Chosen | None]:
    """Returns the first and the last real tokens of each row; None where there are none.

    Args:
        stack: kind of the stack that h is of.
        h: `(rows, tokens, width)`.
        first: how many of the first.
        last: how many of the last.
        asks: who asks, for messages.

    Raises:
        AdapterError: rows and tokens, or the mask of them, can't be told.
    """
    if h.ndim != 3:
        raise AdapterError(
            f"{asks} acts on tokens of each row, but a block of this model answers "
            f"{tuple(h.shape)}, expected (rows, tokens, width)."
        )
    key = ("ends", stack, h.shape[:2], first, last)
    return masks.once(key, lambda: _ends(stack, h, first, last, asks))


def _ends(
    stack: str, h: Tensor, first: int, last: int, asks: str
) -> tuple[Chosen | None, Chosen | None]:
    before, tokens = masks.before(stack), h.shape[1]
    if before:
        last = 0
    counted = _counted(stack, h, before, asks)
    if counted is None:
        stop = max(tokens - last, 0)
        return _run(0, min(first - before, stop)), _run(stop, tokens)
    rank, is_real, length = counted
    is_last = is_real & (rank >= length - last)
    is_first = is_real & (rank < first) & ~is_last
    if before and not bool(is_first.any()):
        return None, None
    return _chosen(is_first, min(first, tokens)), _chosen(is_last, min(last, tokens))


def _counted(stack: str, h: Tensor, before: int, asks: str) -> tuple[Tensor, Tensor, Tensor] | None:
    """Returns which real token of its row each is, whether it is real, and how many rows have.

    `(rows, tokens)` twice and `(rows, 1)`; None where all are real.
    """
    mask = masks.whole(stack, h, asks)
    if mask is None:
        return None
    rank = mask.cumsum(1) - 1
    return rank[:, before:], mask[:, before:], mask.sum(1, keepdim=True)


def _run(start: int, stop: int) -> Chosen | None:
    return Chosen(run=(start, stop)) if stop > start else None


def _chosen(is_meant: Tensor, most: int) -> Chosen | None:
    """Returns the tokens that are meant, at most `most` in a row."""
    if not most:
        return None
    found, index = is_meant.int().topk(most, dim=1)
    return Chosen(index=index, is_meant=found > 0)
