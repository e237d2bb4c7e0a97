"""A new classification head that starts where a linear probe ends, not from noise.

A random head asks the pretrained weights to move toward directions that mean nothing; one that is
already the best linear reading of them lets training begin with what is left to learn. The vectors
are the head's own inputs in the frozen base, so it costs one forward pass over the training data;
of labelled words, over as many evenly spaced rows as have about `MOST_WORDS` of them.

Source: Kumar et al. 2022, arXiv 2202.10054 (linear probing, then fine-tuning).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from graftune.tasks.batches import batches_of_like_length
from graftune.tasks.linear_head import best_head
from graftune.tasks.task import Ready
from graftune.training.lengths import IGNORED_LABEL

MOST_WORDS = 20_000
"""About how many labelled words of a split a head for words is fitted to."""
_BATCH = 32


def start_head(ready: Ready, fresh: Sequence[str], splits: Mapping[str, Sequence[Any]]) -> bool:
    """Fits the new head of a base without adapters to encoded examples, in place.

    Nothing is done, and False returned, where the head's last layer isn't one new linear layer
    that sees one vector for each text, or for each token where tokens are labelled.

    Args:
        ready: The base, its head still as it was initialised.
        fresh: The tensors that its checkpoint doesn't hold.
        splits: Encoded examples; "train" is fitted, "validation" chooses the penalty.
    """
    head = _output_layer(ready.model, fresh, len(ready.labels))
    if head is None:
        return False
    chosen = {split: _chosen(splits[split]) for split in splits}
    vectors = {split: _inputs_of(head, ready, chosen[split]) for split in splits}
    if any(found is None for found in vectors.values()):
        return False
    known = {split: found for split, found in vectors.items() if found is not None}
    targets = {split: _targets(chosen[split]) for split in splits}
    best = best_head(known, targets, len(ready.labels), by="loss")
    with torch.no_grad():
        head.weight.copy_(best.weight)
        if head.bias is not None:  # pyright: ignore[reportUnnecessaryComparison]
            head.bias.copy_(best.bias)
    return True


def _chosen(rows: Sequence[Any]) -> Sequence[Any]:
    """Returns rows with about `MOST_WORDS` labelled words, all rows of texts with one label."""
    if not rows or not isinstance(rows[0]["labels"], list):
        return rows
    words = sum(len(_labelled(row)) for row in rows)
    return rows[:: max(1, round(words / MOST_WORDS))]


def _targets(rows: Sequence[Any]) -> Tensor:
    """Returns the labels of rows, or of their labelled tokens one after the other."""
    if rows and isinstance(rows[0]["labels"], list):
        return torch.tensor([row["labels"][at] for row in rows for at in _labelled(row)])
    return torch.tensor([row["labels"] for row in rows])


def _labelled(row: Mapping[str, Any]) -> list[int]:
    """Returns the places of a row's labelled tokens."""
    return [at for at, label in enumerate(row["labels"]) if label != IGNORED_LABEL]


def _output_layer(model: nn.Module, fresh: Sequence[str], classes: int) -> nn.Linear | None:
    """Returns the last linear layer with a new weight and one output for each class."""
    new = {name.removesuffix(".weight") for name in fresh if name.endswith(".weight")}
    found = [
        module
        for name, module in model.named_modules()
        if name in new and isinstance(module, nn.Linear) and module.out_features == classes
    ]
    return found[-1] if found else None


def _inputs_of(head: nn.Linear, ready: Ready, rows: Sequence[Mapping[str, Any]]) -> Tensor | None:
    """Returns what the head sees of each text or labelled token, `(vectors, features)`.

    None if that isn't one vector.
    """
    seen: list[Tensor] = []
    found: list[Tensor | None] = [None] * len(rows)
    inputs = [{key: row[key] for key in row if key != "labels"} for row in rows]
    handle = head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        for indices, batch in batches_of_like_length(inputs, ready, _BATCH):
            seen.clear()
            with torch.inference_mode():
                ready.model(**batch)
            of_tokens = isinstance(rows[0]["labels"], list)
            if len(seen) != 1 or seen[0].ndim != 2 + of_tokens or len(seen[0]) != len(indices):
                return None
            for index, vector in zip(indices, seen[0].float().cpu(), strict=True):
                found[index] = vector[_labelled(rows[index])] if of_tokens else vector[None]
    finally:
        handle.remove()
    return torch.cat([vectors for vectors in found if vectors is not None])
