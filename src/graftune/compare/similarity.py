"""How alike prompts of several tasks are, and a start made of the likest (SPoT, Vu et al. 2022).

    e = 1/m sum_i p_i                                          a task's embedding, (d,)
    sim(s, t) = cos(e_s, e_t)                                  "mean"
              = 1/m^2 sum_ij cos(p_i^s, p_j^t)                 "pairs"
    P_0 = sum_s alpha_s P^s,  alpha_s = sim_s / sum_s sim_s    of the k likest; below 0 counts as 0

P (m, d) are a task's virtual tokens; all of one base and one m. arXiv 2110.07904, sections 4 and 5.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from graftune.errors import SettingsError, nearest

KINDS = ("mean", "pairs")


def task_embedding(prompt: Tensor) -> Tensor:
    """Returns the mean of a prompt's virtual tokens: (m, d) to (d,)."""
    return prompt.mean(0)


def similarity(one: Tensor, other: Tensor, kind: str = "mean") -> float:
    """Returns how alike two prompts are, from -1 to 1.

    Args:
        one: (m, d).
        other: (m, d).
        kind: "mean", the cosine of their embeddings; "pairs", the mean cosine of all pairs of
            tokens, which is 1 only of a prompt whose tokens all point in one direction.

    Raises:
        SettingsError: there is no such kind, or the prompts have other shapes.

    Example:
        >>> prompt = torch.tensor([[3.0, 0.0], [0.0, 3.0]])
        >>> similarity(prompt, prompt), similarity(prompt, prompt, "pairs")
        (1.0, 0.5)
    """
    if kind not in KINDS:
        raise SettingsError(
            f'similarity is "{kind}", expected {" or ".join(KINDS)}.{nearest(kind, KINDS)}'
        )
    if one.shape != other.shape:
        raise SettingsError(
            f"prompts of {tuple(one.shape)} and {tuple(other.shape)} (tokens, width) can't be "
            "compared: they must have one length and one base."
        )
    one, other = one.double(), other.double()
    if kind == "mean":
        found = F.cosine_similarity(task_embedding(one), task_embedding(other), dim=0)
    else:
        found = (F.normalize(one, dim=1) @ F.normalize(other, dim=1).T).mean()
    return min(1.0, max(-1.0, float(found)))


def ranking(target: Tensor, sources: Mapping[str, Tensor], kind: str = "mean") -> dict[str, float]:
    """Returns the sources' similarity to a target by name, the likest first.

    Raises:
        SettingsError: as `similarity`.
    """
    found = {name: similarity(prompt, target, kind) for name, prompt in sources.items()}
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def weights(similarities: Sequence[float]) -> list[float]:
    """Returns alpha: similarities as shares of their sum, those below 0 as 0.

    Raises:
        SettingsError: none is above 0.

    Example:
        >>> weights([0.75, 0.25, -0.5])
        [0.75, 0.25, 0.0]
    """
    positive = [max(0.0, value) for value in similarities]
    total = sum(positive)
    if total == 0:
        raise SettingsError(
            f"no source is like the target (similarities {[round(v, 3) for v in similarities]}), "
            "so that there is nothing to average."
        )
    return [value / total for value in positive]


def weighted_average(prompts: Sequence[Tensor], alpha: Sequence[float]) -> Tensor:
    """Returns sum alpha P, (m, d); of one prompt, with weight 1, that prompt."""
    return torch.stack([a * prompt for a, prompt in zip(alpha, prompts, strict=True)]).sum(0)
