"""What several members make of one batch, put to the vote: an ensemble of prompts on one base.

    with gt.using(model, gt.Parallel("a", "b", "c")):
        shares = gt.vote(model(**batch).logits, 3)

The members run in one batch (Lester et al. 2021, section 6); any adapters may be members.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from graftune.errors import AdapterError, nearest

_HOW = ("majority", "mean")


def vote(logits: Tensor, members: int, how: str = "majority") -> Tensor:
    """Returns each class's share of the members' votes: (B, ..., classes), each row's sum 1.

    Where as many members vote for one class as for another, the argmax is the one that the members
    find likelier on the mean.

    Args:
        logits: what `gt.Parallel` answers: (members B, ..., classes), one member's rows after
            another's.
        members: how many there are.
        how: "majority" counts each member's likeliest class; "mean" averages probabilities.

    Raises:
        AdapterError: rows that don't divide among the members, or an unknown `how`.

    Example:
        >>> import torch
        >>> said = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 9.0]])
        >>> vote(said, 3).argmax(-1).tolist(), vote(said, 3, how="mean").argmax(-1).tolist()
        ([0], [0])
    """
    if how not in _HOW:
        raise AdapterError(
            f"vote: how is {how!r}, expected one of {', '.join(_HOW)}.{nearest(str(how), _HOW)}"
        )
    if logits.ndim < 2 or members < 1 or len(logits) % members:
        raise AdapterError(
            f"vote: logits of shape {tuple(logits.shape)} aren't one block of rows for each of "
            f"{members} members: run the batch under gt.Parallel with that many."
        )
    chances = logits.float().softmax(-1).unflatten(0, (members, -1))
    mean = chances.mean(0)
    if how == "mean":
        return mean
    votes = F.one_hot(chances.argmax(-1), mean.shape[-1]).sum(0)
    tied = votes == votes.amax(-1, keepdim=True)
    ballots = votes + tied * mean / 2  # less than half a vote: it decides between equals alone
    return ballots / ballots.sum(-1, keepdim=True)
