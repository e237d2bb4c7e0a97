"""Virtual tokens woven into a batch of sequences, and taken out again.

    tokens    [pad pad  x1  x2  x3]          at = 2 (3 to follow x1)
    woven     [fill.. pad pad  P1 .. Pm  x1  x2  x3]

The prompt comes after the padding on the left, so that a padded row is computed as it is alone. Of
rows whose prompts are shorter than the longest, masked places at the very front make up for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Woven:
    """Prompts for every row of a batch.

    Attributes:
        prompt: `(B, M, width)`, those shorter than M at the end of theirs.
        lengths: `(B,)`, or None where all are M.
        is_after_first: whether they follow the first real token.
    """

    prompt: Tensor
    lengths: Tensor | None
    is_after_first: bool

    @property
    def most(self) -> int:
        """M, by which the sequence grows."""
        return self.prompt.shape[1]

    def at(
        self, mask: Tensor | None, rows: int, device: torch.device, known: int | None = None
    ) -> Tensor:
        """Returns before which token of each row the prompt comes, `(B, 1)`; n if all are padding.

        Args:
            mask: `(B, n)`, or None where nothing is padded.
            rows: B.
            device: of the batch.
            known: how many tokens there were when the prompt came in; None for all.
        """
        after = int(self.is_after_first)
        if mask is None:
            return torch.full((rows, 1), after, device=device)
        mask = mask[:, :known]
        at = (mask != 0).int().argmax(dim=1, keepdim=True) + after
        return at.masked_fill(is_empty(mask), mask.shape[1])

    def into(self, virtual: Tensor, tokens: Tensor, at: Tensor) -> Tensor:
        """Returns what is said of virtual tokens and of real ones as one sequence.

        Args:
            virtual: `(B, M, ...)`.
            tokens: `(B, n, ...)`.
            at: see `at`.
        """
        most, fill = self.most, self._fill(at)
        place = torch.arange(most + tokens.shape[1], device=at.device)  # (M + n,)
        source = torch.where(place < most + at, place - at, place)
        source = torch.where(place < fill + at, place - fill + most, source)
        source = torch.where(place < fill, place, source)
        return _picked(torch.cat([virtual.to(tokens.dtype), tokens], dim=1), source)

    def out_of(self, woven: Tensor, at: Tensor) -> Tensor:
        """Returns the real tokens' part of a woven sequence, `(B, n, ...)`."""
        place = torch.arange(woven.shape[1] - self.most, device=at.device)
        return _picked(woven, torch.where(place < at, place + self._fill(at), place + self.most))

    def mask(self, tokens: Tensor, at: Tensor) -> Tensor:
        """Returns the mask of the longer sequence from that of the tokens."""
        place = torch.arange(self.most, device=at.device)
        return self.into((place >= self._fill(at)).expand(len(at), -1), tokens, at)

    def positions(self, tokens: Tensor, at: Tensor, mask: Tensor | None) -> Tensor:
        """Returns positions of the longer sequence: the prompt takes those of what it precedes.

        Rows of padding alone, as the first chunk of a long text may have, start at 0 with it.
        """
        tokens = tokens.expand(len(at), -1)
        place = torch.arange(tokens.shape[1], device=at.device)
        last = tokens.shape[1] - 1
        start = tokens.gather(1, at.clamp(max=last)) + (at > last)
        if mask is not None:
            start = start.masked_fill(is_empty(mask), 0)
        virtual = torch.arange(self.most, device=at.device) - self._fill(at)
        return self.into(start + virtual.clamp(min=0), self.later(tokens, place >= at), at)

    def later(self, positions: Tensor, where: Tensor | bool = True) -> Tensor:
        """Returns positions moved on by the prompt's length, those that come after it."""
        length = self.most if self.lengths is None else self.lengths[:, None]
        return positions + length * where

    def _fill(self, at: Tensor) -> Tensor:
        if self.lengths is None:
            return torch.zeros_like(at)
        return self.most - self.lengths[:, None]


def is_empty(mask: Tensor) -> Tensor:
    """Returns which rows of a mask are padding alone, `(B, 1)`."""
    return (mask == 0).all(dim=1, keepdim=True)


def _picked(tensor: Tensor, places: Tensor) -> Tensor:
    """Returns a tensor's entries at `places`, `(B, n)`, along its second dimension."""
    if tensor.ndim == 2:
        return tensor.gather(1, places)
    return tensor.gather(1, places[:, :, None].expand(-1, -1, tensor.shape[-1]))
