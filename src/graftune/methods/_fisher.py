"""Squared gradients of examples: how much each entry of some tensors matters to their loss."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from graftune.errors import SettingsError

_Gradients = tuple[Tensor | None, ...]


def squared_gradients(
    method: str, model: nn.Module, tensors: list[nn.Parameter], examples: Iterable[dict[str, Any]]
) -> list[Tensor]:
    """Returns the sums over examples of the squared gradients, float32; a mean has their order.

    Raises:
        SettingsError: the model returns no loss, or a gradient that isn't finite.
    """
    found = [torch.zeros_like(tensor, dtype=torch.float32) for tensor in tensors]
    with _differentiable(tensors):
        for example in examples:
            gradients = torch.autograd.grad(
                _loss(method, model, example), tensors, allow_unused=True, materialize_grads=False
            )
            for total, gradient in zip(found, cast(_Gradients, gradients), strict=True):
                if gradient is not None:
                    total.addcmul_(gradient.float(), gradient.float())
    if not all(bool(torch.isfinite(total).all()) for total in found):
        raise SettingsError(f"{method}: gradients of the data are not finite.")
    return found


def _loss(method: str, model: nn.Module, example: dict[str, Any]) -> Tensor:
    loss = getattr(model(**example), "loss", None)
    if not isinstance(loss, Tensor):
        raise SettingsError(
            f"{method}: {type(model).__name__} returned no loss for a batch of "
            f"{', '.join(example)}: add labels."
        )
    if not bool(torch.isfinite(loss)):
        raise SettingsError(f"{method}: the loss of an example is {loss.item()}.")
    return loss


def rows_of(batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields a batch's rows; without labels it is one example, since a loss then compares rows."""
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or not labels.ndim:
        yield batch
        return
    for row in range(len(labels)):
        yield {
            key: value[row : row + 1]
            if isinstance(value, Tensor) and value.shape[:1] == labels.shape[:1]
            else value
            for key, value in batch.items()
        }


@contextlib.contextmanager
def _differentiable(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Lets tensors be differentiated by inside the block."""
    frozen = [tensor for tensor in tensors if not tensor.requires_grad]
    for tensor in frozen:
        tensor.requires_grad_(True)
    try:
        with torch.enable_grad():
            yield
    finally:
        for tensor in frozen:
            tensor.requires_grad_(False)
