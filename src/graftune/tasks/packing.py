"""Several conversations in one row, none of which sees another: less padding, fewer rows.

    tokens     a a a a b b b c c      positions restart at 0 with each, which transformers reads as
    positions  0 1 2 3 0 1 2 0 1      block-diagonal causal attention where there is no mask
    labels     – a a a – b b – c      no first token is learnt, since another's last came before it

Packing is how Krell et al., 2021 (arXiv:2107.02027) call it. Whether a model with its adapters
computes packed rows as it does each alone is tried before it trains: a state space, a prefix that
is kept in a cache or a prompt before the row doesn't.
"""

from __future__ import annotations

import bisect
import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from graftune.errors import TrainingError
from graftune.tasks.chat import IGNORED

if TYPE_CHECKING:
    from torch import Tensor

    from graftune.adapter import Adapter
    from graftune.tasks.task import Ready

Features = Sequence[Mapping[str, Any]]
Collate = Callable[[Features], dict[str, Any]]

TRIED = (9, 6, 4)
"""Tokens of the texts that packing is tried on."""
NOISE = 0.02
"""Added to an adapter's tensors for the trial: many begin with zeros, which show nothing."""
TOLERANCE, HALF_TOLERANCE = 1e-3, 0.1
"""How far logits may differ, of their spread: in float32, and in types of 16 bits."""


def pack(features: Features, limit: int) -> list[dict[str, Any]]:
    """Returns rows of at most `limit` tokens: each text whole, where it leaves least room.

    The longest come first (best-fit decreasing), so the same texts give the same rows.

    Example:
        >>> texts = [{"input_ids": [1, 2], "labels": [1, 2]}, {"input_ids": [3], "labels": [3]}]
        >>> pack(texts, 4)[0]
        {'input_ids': [1, 2, 3], 'labels': [-100, 2, -100], 'position_ids': [0, 1, 0]}
    """
    rooms: list[tuple[int, int]] = []  # what is left in each row, least first
    rows: list[list[Mapping[str, Any]]] = []
    for one in sorted(features, key=lambda one: -len(one["input_ids"])):
        size = len(one["input_ids"])
        at = bisect.bisect_left(rooms, (size, -1))
        room, row = rooms.pop(at) if at < len(rooms) else (max(limit, size), len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(one)
        bisect.insort(rooms, (room - size, row))
    return [_joined(row) for row in rows]


def _joined(texts: Features) -> dict[str, Any]:
    return {
        "input_ids": [token for one in texts for token in one["input_ids"]],
        "labels": [at for one in texts for at in (IGNORED, *one["labels"][1:])],
        "position_ids": [at for one in texts for at in range(len(one["input_ids"]))],
    }


def summary(packed: Features, texts: int) -> str:
    """Returns what packing did, in a sentence."""
    sizes = [len(row["input_ids"]) for row in packed]
    full = sum(sizes) / (max(sizes) * len(sizes))
    return (
        f"{texts:,} conversations were packed into {len(sizes):,} rows of at most {max(sizes):,} "
        f"tokens, which are {full:.0%} full; a batch counts rows."
    )


def collator(plain: Collate) -> Collate:
    """Returns what makes batches of packed rows, which have no mask, and of others as before."""

    def collate(rows: Features) -> dict[str, Any]:
        batch = plain(rows)
        if "position_ids" in batch:
            del batch["attention_mask"]  # padding is at position 0: a text of one token each
            batch["use_cache"] = False  # with a cache transformers doesn't look at positions
        return batch

    return collate


def check(ready: Ready, adapter: Adapter, plain: Collate) -> None:
    """Checks that a model with an adapter computes packed texts as it does each alone.

    Raises:
        TrainingError: it doesn't, so that texts would see each other, or can't take positions.
    """
    who = f"{type(ready.model).__name__} with {adapter.method.name}"
    draw = torch.Generator().manual_seed(0)
    words = min(1000, int(ready.model.config.get_text_config().vocab_size))
    texts = [torch.randint(words, (size,), generator=draw).tolist() for size in TRIED]
    features = [{"input_ids": ids, "labels": ids} for ids in texts]
    rows = [_joined(features), *pack(features[1:2], 0)]  # the second row is padded
    with _shaken(adapter), torch.no_grad():
        alone = [_logits(ready, plain([one]))[0] for one in features]
        try:
            found = _logits(ready, collator(plain)(rows))
        except TypeError as error:
            raise TrainingError(f"train.packing: {who} takes no positions ({error}).") from error
    expected = torch.cat(alone)
    off = float((found[0] - expected).abs().max() / expected.std())
    off = max(off, float((found[1, : len(alone[1])] - alone[1]).abs().max() / expected.std()))
    if not off <= (TOLERANCE if _is_float32(ready) else HALF_TOLERANCE):
        raise TrainingError(
            f"train.packing: {who} doesn't compute conversations in one row as it does each alone "
            f"(logits differ by {off:.1g} of their spread), so they would see each other: leave "
            "packing out, or take a method that acts on each token, such as LoRA or an adapter."
        )


def _logits(ready: Ready, batch: dict[str, Any]) -> Tensor:
    device = ready.model.device
    inputs = {
        key: value.to(device) if isinstance(value, torch.Tensor) else value
        for key, value in batch.items()
        if key != "labels"
    }
    return ready.model(**inputs).logits.float()


def _is_float32(ready: Ready) -> bool:
    return ready.model.dtype == torch.float32


@contextlib.contextmanager
def _shaken(adapter: Adapter) -> Iterator[None]:
    """Adds noise to an adapter's tensors, and takes it away again; the model is in eval mode."""
    model, was_training = adapter.model, adapter.model.training
    tensors = [] if adapter.method.trains_in_place else list(adapter.parameters())
    kept = [one.detach().clone() for one in tensors]
    draw = torch.Generator().manual_seed(0)
    model.eval()
    try:
        for one in tensors:
            one.data.add_(NOISE * torch.randn(one.shape, generator=draw).to(one))
        yield
    finally:
        for one, before in zip(tensors, kept, strict=True):
            one.data.copy_(before)
        model.train(was_training)
