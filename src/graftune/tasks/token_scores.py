"""What language models are measured by: the losses and hits of the tokens that are to be said."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from graftune.tasks import metrics

if TYPE_CHECKING:
    from torch import Tensor

IGNORED = -100


def token_sums(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns each row's summed loss, labelled tokens and right tokens.

    Args:
        logits: `(rows, tokens, vocabulary)`, each of the label at its own place.
        labels: `(rows, tokens)`, −100 where nothing is to be said.

    Returns:
        `(rows, 3)`.
    """
    import torch

    wanted = labels != IGNORED
    rows = wanted.nonzero()[:, 0]
    chosen, right = logits[wanted].float(), labels[wanted]
    losses = torch.nn.functional.cross_entropy(chosen, right, reduction="none")
    hits = (chosen.argmax(dim=-1) == right).float()
    parts = torch.stack([losses, torch.ones_like(losses), hits], dim=-1)
    return parts.new_zeros(len(labels), 3).index_add_(0, rows, parts)


def token_metrics(sums: Any) -> dict[str, float]:
    """Returns perplexity and token accuracy over all rows' tokens."""
    loss, tokens, right = (float(total) for total in sums.sum(axis=0))
    return {
        "perplexity": metrics.perplexity(loss, tokens),
        "token_accuracy": metrics.token_accuracy(right, tokens),
    }
