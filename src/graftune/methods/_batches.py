"""The data that a method looks at before it is attached: batches through the base as it is."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from graftune.errors import SettingsError


def batches(
    model: nn.Module, data: Iterable[Mapping[str, Tensor]], method: str
) -> Iterator[dict[str, Any]]:
    """Yields the batches of `data` on the model's device.

    Raises:
        SettingsError: a batch is no dictionary, or there is none.
    """
    device = next(model.parameters()).device
    count = 0
    for count, batch in enumerate(data, 1):  # noqa: B007
        if not isinstance(batch, Mapping):
            raise SettingsError(
                f"{method}: a batch of data is a {type(batch).__name__}, expected a dictionary of "
                "what the model's forward takes, such as input_ids and attention_mask."
            )
        yield {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    if not count:
        raise SettingsError(
            f"{method}: data holds no batch; an iterator can be used up by an earlier look."
        )


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Keeps a model in eval mode inside the block, and each module as it was after."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
