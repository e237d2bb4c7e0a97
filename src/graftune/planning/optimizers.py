"""What an optimizer keeps for each trained value, and what its step needs besides.

Torch's and transformers' own optimizers are run. Those of bitsandbytes, which needs a device to
run, keep what its documentation says: 8-bit states in blocks of 256 with a float32 scale each, and
float32 states for tensors of fewer than 4096 values. Paged states count as the host's: that is
where they go when the device runs short.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graftune.planning.settings import PlanSettings
from graftune.planning.tracking import OPTIMIZER, Ledger

RUN = ("adamw_torch_fused", "adamw_torch", "sgd", "adafactor", "adagrad", "rmsprop")
"""Optimizers that are run, by transformers' names."""
BLOCK, SMALL = 256, 4096


@dataclass(frozen=True)
class States:
    """States of a bitsandbytes optimizer: values for each trained one, and their bits."""

    values: int
    bits: int
    is_paged: bool = False

    def nbytes(self, count: int) -> int:
        """Returns the bytes for a tensor of `count` values."""
        if self.bits == 32 or count < SMALL:
            return 4 * self.values * count
        return self.values * (count + 4 * -(-count // BLOCK))


KEPT = {
    "adamw_8bit": States(2, 8),
    "adamw_bnb_8bit": States(2, 8),
    "paged_adamw_8bit": States(2, 8, True),
    "paged_adamw_32bit": States(2, 32, True),
    "lion_8bit": States(1, 8),
    "lion_32bit": States(1, 32),
    "paged_lion_8bit": States(1, 8, True),
    "paged_lion_32bit": States(1, 32, True),
    "ademamix": States(3, 32),
    "ademamix_8bit": States(3, 8),
    "paged_ademamix_8bit": States(3, 8, True),
    "paged_ademamix_32bit": States(3, 32, True),
    "rmsprop_bnb": States(1, 32),
    "rmsprop_bnb_32bit": States(1, 32),
    "rmsprop_bnb_8bit": States(1, 8),
}


def known() -> tuple[str, ...]:
    """Returns the names that can be planned."""
    return (*RUN, *KEPT)


class Kept:
    """A bitsandbytes optimizer's states, which its step changes in place."""

    def __init__(self, parameters: Sequence[Tensor], kind: States) -> None:
        self.states = [
            torch.empty(kind.nbytes(one.numel()), dtype=torch.uint8, device=one.device)
            for one in parameters
        ]

    def tensors(self) -> list[Tensor]:
        """Returns the states."""
        return self.states

    def step(self) -> None:
        """Changes them in place, which needs nothing."""


class Run:
    """An optimizer that is run, its states made by a first step as in training."""

    def __init__(self, parameters: Sequence[Tensor], settings: PlanSettings) -> None:
        self.optimizer = made(parameters, settings)
        for one in parameters:
            one.grad = torch.zeros_like(one)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def tensors(self) -> list[Tensor]:
        """Returns the states."""
        states = self.optimizer.state.values()
        return [value for state in states for value in state.values() if isinstance(value, Tensor)]

    def step(self) -> None:
        """Takes a step."""
        self.optimizer.step()


def prepared(parameters: Sequence[Tensor], settings: PlanSettings, ledger: Ledger) -> Run | Kept:
    """Returns the optimizer of a plan, with its states, which the ledger knows."""
    kind = KEPT.get(settings.optimizer)
    found = Run(parameters, settings) if kind is None else Kept(parameters, kind)
    is_host = "optimizer" in settings.offload or (
        kind is not None and kind.is_paged and settings.device == "cuda"
    )
    for state in found.tensors():
        ledger.note(state, OPTIMIZER)
        if is_host:
            ledger.move_to_host(state)
    return found


def made(parameters: Sequence[Tensor], settings: PlanSettings) -> torch.optim.Optimizer:
    """Returns an optimizer as transformers' Trainer makes it; for CUDA with its kernels."""
    from transformers import Adafactor

    kinds: dict[str, Any] = {
        "adamw_torch_fused": (torch.optim.AdamW, {"fused": True}),
        "adamw_torch": (torch.optim.AdamW, {}),
        "sgd": (torch.optim.SGD, {}),
        "adafactor": (Adafactor, {"scale_parameter": False, "relative_step": False}),
        "adagrad": (torch.optim.Adagrad, {}),
        "rmsprop": (torch.optim.RMSprop, {}),
    }
    kind, options = kinds[settings.optimizer]
    if settings.device == "cuda" and settings.optimizer not in ("adamw_torch_fused", "adafactor"):
        options = {**options, "foreach": True}
    return kind(parameters, lr=1e-3, **options)
