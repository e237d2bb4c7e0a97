"""Training of models that FSDP2 or DeepSpeed ZeRO-3 shards: what can be, and the optimizer's state.

An FSDP2 run's checkpoint holds whole tensors, as one process would write them, so a run goes on
with more processes, fewer, or one. ZeRO-3 writes its own files, one for each process.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graftune.adapter import Adapter
from graftune.errors import TrainingError
from graftune.sites import shards

OPTIMIZER, SCHEDULER = "optimizer.pt", "scheduler.pt"


def asked() -> str | None:
    """Returns what was asked to shard the model by the launcher, or None."""
    for name, variable in (("FSDP", "FSDP"), ("DeepSpeed", "DEEPSPEED")):
        if os.environ.get(f"ACCELERATE_USE_{variable}", "").lower() in ("true", "1"):
            return name
    return None


def kind_of(trainer: Any) -> str | None:
    """Returns what shards a Trainer's model: "FSDP2", "ZeRO-3", or None.

    Raises:
        TrainingError: FSDP 1 does; or sharding was asked for, and accelerate won't.
    """
    if trainer.is_fsdp_enabled:
        version = getattr(trainer.accelerator.state.fsdp_plugin, "fsdp_version", 1)
        if version != 2:
            raise TrainingError(
                f"FSDP {version} flattens trained and frozen tensors into one, which adapters "
                "can't share: set fsdp_version: 2."
            )
        return "FSDP2"
    if trainer.is_deepspeed_enabled:
        stage = trainer.accelerator.state.deepspeed_plugin.zero_stage
        return "ZeRO-3" if stage == 3 else None
    if trainer.args.fsdp or asked() == "FSDP":
        raise TrainingError(
            "FSDP was asked for, but accelerate shards over accelerators alone and found none: "
            "on CPUs leave it out, and the processes train with DDP."
        )
    return None


def check(kind: str, model: nn.Module, adapters: Iterable[Adapter]) -> None:
    """Checks that adapters can train on a model that is going to be sharded.

    Raises:
        TrainingError: one can't; the message says why, and what can.
    """
    shared = _shared(model)
    for adapter in adapters:
        method, name = adapter.method, f'"{adapter.name}" ({adapter.method.name})'
        if method.needs_steps(adapter):
            raise TrainingError(
                f"{name} has a penalty or a schedule, which reads whole tensors at each step, but "
                f"{kind} leaves each process a part of them: train it with DDP."
            )
        if method.changes_at_the_end(adapter):
            raise TrainingError(
                f"{name} replaces its tensors when training ends, but those that {kind} sharded "
                "can't be replaced: train it with DDP, or without what makes its values "
                "(hidden=None, encoder=none)."
            )
        found = next((n for n, p in adapter.named_parameters() if id(p) in shared), None)
        if kind == "FSDP2" and found is not None and not method.trains_in_place:
            raise TrainingError(
                f'{name} has "{found}" in several blocks, each of which FSDP2 shards by itself: '
                "train it with DDP."
            )


def _shared(model: nn.Module) -> set[int]:
    """Returns the ids of the parameters that lie in several places."""
    seen: set[int] = set()
    twice: set[int] = set()
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                (twice if id(parameter) in seen else seen).add(id(parameter))
    return twice


def save_optimizer(trainer: Any, folder: Path) -> None:
    """Writes the optimizer's state, gathered, and the scheduler's; every process calls it."""
    state = trainer.optimizer.state_dict()
    state["state"] = {
        number: {key: _gathered(value) for key, value in values.items()}
        for number, values in state["state"].items()
    }
    if trainer.args.should_save:
        torch.save(state, folder / OPTIMIZER)
        torch.save(trainer.lr_scheduler.state_dict(), folder / SCHEDULER)


def load_optimizer(trainer: Any, folder: Path) -> None:
    """Puts back what `save_optimizer` wrote, or one process did.

    Raises:
        TrainingError: the state isn't there.
    """
    if not (folder / OPTIMIZER).is_file():
        raise TrainingError(
            f'"{folder}" has no {OPTIMIZER}, so its optimizer can\'t go on here: it was written by '
            "DeepSpeed, or without it. gt.load its adapter and train anew."
        )
    state = torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True)
    trained = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    state["state"] = {
        number: {key: _parted(value, trained[number]) for key, value in values.items()}
        for number, values in state["state"].items()
    }
    trainer.optimizer.load_state_dict(state)
    scheduler = torch.load(folder / SCHEDULER, weights_only=True)
    trainer.lr_scheduler.load_state_dict(scheduler)


def save_zero(trainer: Any, folder: Path) -> None:
    """Writes the parts of ZeRO-3's optimizer state, without the frozen base; all call it."""
    trainer.model_wrapped.save_checkpoint(str(folder), exclude_frozen_parameters=True)
    if trainer.args.should_save:
        torch.save(trainer.lr_scheduler.state_dict(), folder / SCHEDULER)


def load_zero(trainer: Any, folder: Path) -> None:
    """Puts back what `save_zero` wrote, in as many processes.

    Raises:
        TrainingError: there is none.
    """
    if not any(folder.glob("global_step*")):
        raise TrainingError(
            f'"{folder}" has no state of ZeRO-3\'s optimizer: it was written without DeepSpeed. '
            "Resume it as it began, or gt.load its adapter and train anew."
        )
    trainer.model_wrapped.load_checkpoint(str(folder), load_module_strict=False)
    trainer.lr_scheduler.load_state_dict(torch.load(folder / SCHEDULER, weights_only=True))


def check_processes(kind: str | None, then: Any, now: int, folder: Path) -> None:
    """Checks that a checkpoint's optimizer state can be read by so many processes.

    Raises:
        TrainingError: ZeRO-3 wrote it for another number.
    """
    if kind == "ZeRO-3" and then != now:
        raise TrainingError(
            f'"{folder}" holds an optimizer that ZeRO-3 cut into {then} parts, and there are {now} '
            f"processes: resume with {then}, or gt.load its adapter and train anew."
        )


def _gathered(value: Any) -> Any:
    return shards.whole_of(value).cpu() if isinstance(value, Tensor) else value


def _parted(value: Any, parameter: Tensor) -> Any:
    is_like = isinstance(value, Tensor) and value.shape == parameter.shape
    return shards.part_of(value, parameter) if is_like else value
