"""LoRA on the last blocks alone: time and kept bytes of a step, with and without checkpoints."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import graftune as gt
from benchmarks.lora_step import step
from benchmarks.measure import ROUNDS, Row, row, take_turns
from benchmarks.models import RANK, classification_batch, minilm

TOP = (4, 5)
MIB = 2**20


def run(rounds: int = ROUNDS) -> list[Row]:
    base, batch = minilm(), classification_batch()
    models = {
        "ours, all": _ours(base, None),
        "ours": _ours(base, TOP),
        "peft": _peft(base, TOP),
        "ours, checkpointed": _checkpointed(_ours(base, TOP)),
        "peft, checkpointed": _peft(_checkpointed(copy.deepcopy(base)), TOP),
    }
    kept = {name: kept_bytes(model, batch) for name, model in models.items()}
    times = take_turns({name: step(model, batch) for name, model in models.items()}, rounds)
    pairs = (
        ("last 2 of 6", "ours", "ours, all", "× all blocks", 0.75, 0.45),
        ("last 2 of 6", "ours", "peft", "× PEFT", 1.05, 1.0),
        ("checkpointed", "ours, checkpointed", "peft, checkpointed", "× PEFT", 0.6, 1.0),
    )
    found: list[Row] = []
    for what, mine, other, unit, in_time, in_bytes in pairs:
        ratios = [t[mine] / t[other] for t in times]
        note = f"LoRA of r={RANK}, {' rows of '.join(map(str, batch['input_ids'].shape))} tokens"
        found.append(row(f"backward_cut, {what}, step", ratios, in_time, unit=unit, note=note))
        note = f"{kept[mine] / MIB:.1f} MiB against {kept[other] / MIB:.1f} MiB"
        ratio = [kept[mine] / kept[other]]
        found.append(row(f"backward_cut, {what}, kept", ratio, in_bytes, unit=unit, note=note))
    return found


def kept_bytes(model: nn.Module, batch: Mapping[str, Any]) -> int:
    """Returns the bytes that a forward pass keeps for the backward, without the parameters."""
    kept = Kept()
    model.train()
    with torch.autograd.graph.saved_tensors_hooks(kept.note, lambda tensor: tensor):
        model(**batch)
    return kept.bytes(model)


class Kept:
    """What graphs keep, as they say it."""

    def __init__(self) -> None:
        self._alive: list[Tensor] = []  # else a tensor's place could be given to the next

    def note(self, kept: Any) -> Any:
        """Notes what is kept, if it is a tensor."""
        if isinstance(kept, Tensor) and not isinstance(kept, nn.Parameter):
            self._alive.append(kept)
        return kept

    def bytes(self, model: nn.Module) -> int:
        """Returns the bytes of all storages that aren't the model's parameters'."""
        storages = [tensor.untyped_storage() for tensor in self._alive]
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
        return sum(size for place, size in sizes.items() if place not in own)


def _ours(base: Any, layers: tuple[int, ...] | None) -> Any:
    model = copy.deepcopy(base)
    gt.attach(model, gt.LoRA(r=RANK, layers=layers), seed=0)
    return model


def _peft(base: Any, layers: tuple[int, ...]) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="SEQ_CLS",
        r=RANK,
        lora_alpha=RANK,
        target_modules=["query", "key", "value", "dense"],
        layers_to_transform=list(layers),
    )
    return get_peft_model(copy.deepcopy(base), config)


def _checkpointed(model: Any) -> Any:
    enable: Callable[..., Any] = getattr(
        model, "activation_checkpointing_enable", model.gradient_checkpointing_enable
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        enable()
    return model
