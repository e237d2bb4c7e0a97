"""What deltas put before an attention's keys and values, with gates of rows or of tokens.

    of rows      G P_k, G P_v                    the prefix is another one in each row
    of tokens    softmax(G_t q_t P_k), G_t P_v   another one for each query

The second is plain attention on wider heads, exactly:

    q' = [q ; (G - 1) q]    P_k' = [P_k ; P_k]    K' = [K ; 0]       q' P_k' = G q P_k,  q' K' = q K
    P_v' = [0 ; P_v]        V' = [V ; 0]          answer = first half + G * second half
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graftune.sites.base import AttentionDelta
from graftune.sites.infix import seen_by

Gates = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Prefix:
    """Keys and values to put before an attention's own.

    Attributes:
        key: `(length, heads * D)`, or `(B, length, heads * D)` where rows differ.
        value: of the same form.
        by_token: what multiplies them for each query, `(B, q, 1)` each; None for nothing.
        seeing: how many of the last queries see them, for all rows or `(B,)`; None for all.
    """

    key: Tensor
    value: Tensor
    by_token: Gates | None = None
    seeing: int | Tensor | None = None

    @property
    def length(self) -> int:
        """How many there are."""
        return self.key.shape[-2]

    def visible(self, query: Tensor) -> Tensor | None:
        """Returns which queries see them, `(1 or B, 1, q, length)`; None if all do.

        Args:
            query: `(B, H, q, D)`.
        """
        count, last = query.shape[2], self.seeing
        if last is None or (isinstance(last, int) and last >= count):
            return None
        left = torch.arange(count, 0, -1, device=query.device)  # the last query has 1
        seen = left <= (last if isinstance(last, int) else last[:, None])
        return seen.view(-1, 1, count, 1).expand(-1, -1, -1, self.length)


def columns(found: Sequence[Prefix], query: Tensor) -> Tensor | None:
    """Returns which queries see each column of prefixes, `(1 or B, 1, q, m)`; None if all do.

    Args:
        found: the prefixes, m columns together.
        query: `(B, H, q, D)`.
    """
    parts = [prefix.visible(query) for prefix in found]
    if all(part is None for part in parts):
        return None
    rows = max(len(part) for part in parts if part is not None)
    whole = query.new_ones(1, 1, query.shape[2], 1, dtype=torch.bool)
    seen = [
        (whole.expand(-1, -1, -1, prefix.length) if part is None else part).expand(rows, -1, -1, -1)
        for prefix, part in zip(found, parts, strict=True)
    ]
    return torch.cat(seen, -1)


def prefixes(
    deltas: Sequence[AttentionDelta], heads: int, hidden: Tensor | None, rows: int
) -> list[Prefix]:
    """Returns what deltas put before, the last of them first.

    Args:
        deltas: in the order in which they act.
        heads: of keys and values.
        hidden: what the attention was given, `(B, q, width)`; needed where gates read it.
        rows: B.

    Raises:
        AdapterError: one is an infix, and nobody said who sees it.
    """
    return list(_each(deltas, heads, hidden, rows))


def _each(
    deltas: Sequence[AttentionDelta], heads: int, hidden: Tensor | None, rows: int
) -> Iterator[Prefix]:
    for delta in reversed(deltas):
        seeing = seen_by(rows) if delta.is_infix else None
        pair = None if isinstance(seeing, int) and seeing == 0 else delta.prefix(heads)
        if pair is None:
            continue
        if not delta.reads_input:
            yield Prefix(*pair, seeing=seeing)
            continue
        assert hidden is not None
        key_gate, value_gate = delta.gates(hidden)
        if key_gate.shape[1] == 1:
            yield Prefix(key_gate * pair[0], value_gate * pair[1], seeing=seeing)
        else:
            yield Prefix(*pair, (key_gate, value_gate), seeing)


def by_head(prefix: Tensor, own: Tensor) -> Tensor:
    """Returns keys or values, `([B,] length, heads * D)`, in the form of the attention's own."""
    heads = prefix.to(own.dtype).unflatten(-1, (own.shape[1], own.shape[3])).transpose(-2, -3)
    return heads.expand(own.shape[0], *heads.shape[-3:])  # (B, heads, length, D)


def widened(
    query: Tensor, key: Tensor, value: Tensor, found: Sequence[Prefix]
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns queries, keys and values on heads that are wider by D for each gate of tokens.

    Args:
        query: `(B, H, q, D)`.
        key: `(B, heads, k, D)`, the prefixes first.
        value: of the same form.
        found: the prefixes, in that order.
    """
    queries, keys, values, start = [query], [key], [value], 0
    for prefix in found:
        inside = torch.zeros(key.shape[2], 1, dtype=key.dtype, device=key.device)
        inside[start : (start := start + prefix.length)] = 1
        if prefix.by_token is not None:
            gate = prefix.by_token[0].to(query.dtype).unsqueeze(1)  # (B, 1, q, 1)
            queries.append((gate - 1) * query)
            keys.append(key * inside)
            values.append(value * inside)
            values[0] = values[0] * (1 - inside)
    return torch.cat(queries, -1), torch.cat(keys, -1), torch.cat(values, -1)


def narrowed(output: Tensor, size: int, found: Sequence[Prefix]) -> Tensor:
    """Returns the answer, `(B, q, H, D)`, from that of wider heads."""
    first, *more = output.split(size, -1)
    gates = [prefix.by_token[1] for prefix in found if prefix.by_token is not None]
    for gate, part in zip(gates, more, strict=True):
        first = first + gate.to(part.dtype).unsqueeze(2) * part
    return first
