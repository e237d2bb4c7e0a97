"""Batches to predict on: texts of like length together, so that little is padded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from graftune.tasks.task import Ready
from graftune.training.lengths import PadToLongest


def collator(ready: Ready, side: str = "right") -> PadToLongest:
    """Returns what pads examples to the longest of a batch, on the right or the left side."""
    pad: Any = ready.tokenizer.pad_token_id
    return PadToLongest(0 if pad is None else int(pad), side=side)


def batches_of_like_length(
    rows: Sequence[Mapping[str, Any]],
    ready: Ready,
    batch_size: int,
    *,
    side: str = "right",
    collate: Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]] | None = None,
) -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
    """Yields the indices and the padded tensors of batches, the longest examples first.

    The batches depend on the lengths and the batch size alone, so the same rows give the same
    answers bit for bit in every process.
    """
    collate = collate or collator(ready, side)
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index]["input_ids"]))
    device = ready.model.device
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        batch = collate([rows[index] for index in indices])
        yield indices, {key: tensor.to(device) for key, tensor in batch.items()}
