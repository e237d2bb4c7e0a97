"""Whether a model's loss is the sum over a step's items, divided by their number, as it is told.

transformers' Trainer tells every model that takes further keywords how many labels a step has, over
all processes and accumulated batches, and scales what comes back. Some models (those that classify
sequences or tokens, among others) take the number and answer with the mean of their batch all the
same: their loss, and its gradient, would be larger by the number of processes and batches.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


def reads_count(model: nn.Module, batch: Mapping[str, Any]) -> bool:
    """Returns whether a model's loss depends on `num_items_in_batch`, from two forward passes."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            one, two = (
                _loss(model(**batch, num_items_in_batch=torch.tensor(count))) for count in (1, 2)
            )
    finally:
        model.train(was_training)
    return not torch.equal(one, two)


def _loss(outputs: Any) -> torch.Tensor:
    return outputs["loss"] if isinstance(outputs, Mapping) else outputs[0]
