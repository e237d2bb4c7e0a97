"""What a GPU needn't hold all the time, in the host's memory: saved activations, optimizer state.

forward    x ──> saved for backward ──> pinned host memory
backward   pinned host memory ──> x, when its turn comes

step       state ──> device, update, state ──> host: while activations are there, it isn't
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from graftune.errors import TrainingError

LEAST_BYTES = 2**16
"""Smaller tensors stay: moving them costs more than it saves."""


class _Moved(NamedTuple):
    """A saved tensor in the host's memory, and where it came from."""

    values: Tensor
    device: torch.device


class SavedElsewhere(torch.autograd.graph.saved_tensors_hooks):
    """Keeps what a pass saves for its backward in the host's memory; parameters stay.

    Args:
        model: whose parameters and buffers aren't moved: autograd saves them too.
        device: the kind of device to move from.
        least: bytes of the smallest tensor to move.
    """

    def __init__(self, model: nn.Module, device: str = "cuda", least: int = LEAST_BYTES) -> None:
        own = [*model.parameters(), *model.buffers()]
        self._own = {tensor.untyped_storage().data_ptr() for tensor in own}
        self._device, self._least = device, least
        self.bytes = 0
        """How many were moved."""
        super().__init__(self._pack, _back)

    def _pack(self, saved: Tensor) -> Tensor | _Moved:
        size = saved.numel() * saved.element_size()
        if saved.device.type != self._device or size < self._least:
            return saved
        if saved.untyped_storage().data_ptr() in self._own:
            return saved
        self.bytes += size
        return _Moved(_on_host(saved), saved.device)


def _back(kept: Tensor | _Moved) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    return kept.values.to(kept.device, non_blocking=True)


def _on_host(tensor: Tensor) -> Tensor:
    """Returns a copy in the host's memory; a device's later work on the same stream follows it."""
    is_far = tensor.device.type != "cpu"
    made = torch.empty_like(tensor, device="cpu", pin_memory=is_far)
    return made.copy_(tensor.detach(), non_blocking=is_far)


class StateElsewhere:
    """Keeps an optimizer's state in the host's memory between its steps.

    The update is computed where the parameters are, by the optimizer itself, so it is the same bit
    for bit. Only during a step is the state on the device.

    Args:
        optimizer: any of torch's kind.
        device: the kind of device to move from.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: str = "cuda") -> None:
        self._device = device
        self._homes: dict[tuple[int, str], torch.device] = {}
        self.bytes = 0
        """How many lie in the host's memory."""
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)

    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for parameter, state in optimizer.state.items():
            for name, value in state.items():
                home = self._homes.get((id(parameter), name))
                if home is not None and isinstance(value, Tensor):
                    state[name] = value.to(home, non_blocking=True)

    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self.bytes = 0
        for parameter, state in optimizer.state.items():
            for name, value in state.items():
                if isinstance(value, Tensor) and value.device.type == self._device:
                    self._homes[id(parameter), name] = value.device
                    state[name] = _on_host(value)
                    self.bytes += value.numel() * value.element_size()


class Offloading:
    """What a Trainer keeps in the host's memory."""

    def __init__(self, activations: bool, optimizer: bool) -> None:
        self.activations, self.optimizer = activations, optimizer

    def check(self, args: TrainingArguments) -> None:
        """Raises TrainingError if there is nothing to move away from, or another does it."""
        for name, asked in (
            ("offload_activations", self.activations),
            ("offload_optimizer", self.optimizer),
        ):
            if asked and args.device.type != "cuda":
                raise TrainingError(
                    f"{name} moves what a GPU holds to the host's memory, but training runs on the "
                    f"{args.device.type}, where it would have no effect: leave it out."
                )
        if not self.optimizer:
            return
        name = str(getattr(args.optim, "value", args.optim))
        if "paged" in name:
            raise TrainingError(
                f'offload_optimizer: the optimizer "{name}" pages its state to the '
                "host by itself; leave one of the two out."
            )
        if args.deepspeed or args.fsdp:
            raise TrainingError(
                "offload_optimizer: DeepSpeed and FSDP keep the optimizer's state themselves; say "
                "in their settings that it is to be offloaded."
            )

    def passing(self, model: nn.Module) -> contextlib.AbstractContextManager[Any]:
        """Returns what a training pass runs in."""
        is_asked = self.activations and model.training
        return SavedElsewhere(model) if is_asked else contextlib.nullcontext()
