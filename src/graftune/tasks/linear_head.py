"""Softmax regression on fixed vectors: the linear probe's classifier, and a new head's start.

minimise over W, b:   mean cross-entropy(W x + b, y) + penalty · ‖W‖² / 2        by L-BFGS
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

PENALTIES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
"""Weights of ‖W‖² / 2 that are tried on the validation data, strongest first."""
DEFAULT_PENALTY = 1e-3
"""The weight without validation data."""
_STEPS = 100


@dataclass(frozen=True)
class Head:
    """A linear classifier: weight (classes, features), bias (classes)."""

    weight: Tensor
    bias: Tensor

    def logits(self, vectors: Tensor) -> Tensor:
        """Returns (rows, classes) of vectors (rows, features)."""
        return vectors @ self.weight.T + self.bias


def best_head(
    vectors: Mapping[str, Tensor],
    targets: Mapping[str, Tensor],
    classes: int,
    *,
    by: Literal["accuracy", "loss"],
) -> Head:
    """Returns the head whose penalty does best on "validation" (`DEFAULT_PENALTY` without it)."""
    train, answers = vectors["train"], targets["train"]
    if "validation" not in vectors:
        return fit_head(train, answers, classes, DEFAULT_PENALTY)
    heads = [fit_head(train, answers, classes, penalty) for penalty in PENALTIES]
    judge = _wrong if by == "accuracy" else _loss
    faults = [judge(head, vectors["validation"], targets["validation"]) for head in heads]
    return heads[int(np.argmin(faults))]


def _wrong(head: Head, vectors: Tensor, targets: Tensor) -> float:
    return float((head.logits(vectors).argmax(dim=-1) != targets).sum())


def _loss(head: Head, vectors: Tensor, targets: Tensor) -> float:
    return float(torch.nn.functional.cross_entropy(head.logits(vectors), targets))


def fit_head(vectors: Tensor, targets: Tensor, classes: int, penalty: float) -> Head:
    """Returns the softmax regression that minimises mean cross-entropy + penalty · ‖W‖² / 2."""
    weight = torch.zeros(classes, vectors.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight, bias], max_iter=_STEPS, line_search_fn="strong_wolfe", tolerance_grad=1e-6
    )

    def loss() -> Tensor:
        solver.zero_grad()
        logits = vectors @ weight.T + bias
        value = torch.nn.functional.cross_entropy(logits, targets)
        value = value + penalty / 2 * weight.square().sum()
        value.backward()
        return value

    solver.step(loss)  # pyright: ignore[reportArgumentType]  (torch types the closure as float)
    return Head(weight.detach(), bias.detach())
