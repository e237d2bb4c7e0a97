"""A plan: what one training step would need of memory, time and disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from graftune.errors import SettingsError
from graftune.methods.base import Method
from graftune.planning import timing
from graftune.planning.settings import PlanSettings
from graftune.planning.skeletons import Base, base_of
from graftune.planning.steps import Simulated, simulate
from graftune.planning.tracking import OPTIMIZER, WEIGHTS
from graftune.tasks.resolving import method_of

CHECKPOINT_EXTRA = 64 * 2**10
"""Bytes of a checkpoint's small files: random states, the Trainer's state, the settings."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What one training step of a model with a method needs.

    Attributes:
        model: what the model is called.
        task: what it is made for.
        method: what trains.
        settings: how.
        parts: bytes on the device when most are in use, by what they are for.
        host_parts: bytes on the host of what is moved there.
        floor_bytes: of the loaded model and its adapter on the device.
        base_parameters: parameters of the base.
        trained_parameters: those that train.
        adapter_dtype: type of what trains.
        flops: operations of the products of matrices in one step, all accumulated batches.
        traffic_bytes: bytes that other operations read and write in one step.
        seconds_per_step: from this machine's speed; None if it wasn't tried or the device isn't
            here.
        base_disk_bytes: the base as it is kept here.
        adapter_disk_bytes: a saved adapter.
        checkpoint_disk_bytes: a checkpoint to resume from.
    """

    model: str
    task: str
    method: Method
    settings: PlanSettings
    parts: Mapping[str, int]
    host_parts: Mapping[str, int]
    floor_bytes: int
    base_parameters: int
    trained_parameters: int
    adapter_dtype: str
    flops: int
    traffic_bytes: int
    seconds_per_step: float | None
    base_disk_bytes: int
    adapter_disk_bytes: int
    checkpoint_disk_bytes: int

    @property
    def peak_bytes(self) -> int:
        """Bytes on the device when most are in use."""
        return sum(self.parts.values())

    @property
    def rise_bytes(self) -> int:
        """How far the peak is above the loaded model."""
        return self.peak_bytes - self.floor_bytes

    @property
    def host_bytes(self) -> int:
        """Bytes on the host of what is moved there."""
        return sum(self.host_parts.values())

    def to_dict(self) -> dict[str, Any]:
        """Returns the plan as JSON-able values."""
        found = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {
            **found,
            "method": self.method.to_dict(),
            "settings": asdict(self.settings),
            "parts": dict(self.parts),
            "host_parts": dict(self.host_parts),
            "peak_bytes": self.peak_bytes,
            "rise_bytes": self.rise_bytes,
            "host_bytes": self.host_bytes,
        }


def plan(
    model: Any,
    method: Method | str | Mapping[str, Any],
    *,
    task: str | None = None,
    timed: bool = False,
    **settings: Any,
) -> Plan:
    """Returns what one training step would need; no weights are loaded, no device is used.

    The step is run in earnest but for its numbers: the model, the method, autograd and the
    optimizer, on tensors that have shapes alone.

    Args:
        model: a name or folder as `attach`'s bases have, a config.json or its contents, or
            transformers' configuration.
        method: settings such as `LoRA(r=8)`, a method's name, or `{"name": …}`.
        task: such as "classification" or "instruct"; None: what the model's class is for.
        timed: whether to try this machine's speed for a moment, for the time of a step.
        settings: those of `PlanSettings`, as `batch_size=16, length=256`.

    Raises:
        SettingsError: there is no such model, task or setting, or the method can't act on it.
        FormatError: a folder or file holds no configuration.

    Example:
        >>> import graftune as gt
        >>> bert = {"model_type": "bert", "num_hidden_layers": 2, "hidden_size": 64,
        ...         "num_attention_heads": 2, "intermediate_size": 128}
        >>> found = gt.plan(bert, gt.LoRA(r=8, targets="qv"), batch_size=16, length=128)
        >>> found.trained_parameters, found.peak_bytes > found.floor_bytes
        (4226, True)
    """
    asked = PlanSettings.of(**settings)
    base = base_of(model, task, asked.labels)
    if settings.get("length") is None:
        asked = shortened(base, asked)
    return planned(base, chosen(method), asked, timed=timed)


def planned(base: Base, method: Method, settings: PlanSettings, *, timed: bool = False) -> Plan:
    """Returns the plan of a configuration that was found.

    Raises:
        SettingsError: as for `plan`.
    """
    _check_length(base, settings)
    found = simulate(base, method, settings)
    flops = found.flops * settings.accumulation
    traffic = found.traffic * settings.accumulation
    states = found.device[OPTIMIZER] + found.host[OPTIMIZER]
    return Plan(
        model=base.name,
        task=base.task,
        method=method,
        settings=settings,
        parts=found.device,
        host_parts=found.host,
        floor_bytes=found.floor,
        base_parameters=found.base_count,
        trained_parameters=found.trained,
        adapter_dtype=found.adapter_dtype,
        flops=flops,
        traffic_bytes=traffic,
        seconds_per_step=_seconds(found, settings) if timed else None,
        base_disk_bytes=found.device[WEIGHTS] + found.host[WEIGHTS],
        adapter_disk_bytes=found.adapter_bytes,
        checkpoint_disk_bytes=found.adapter_bytes + states + CHECKPOINT_EXTRA,
    )


def shortened(base: Base, settings: PlanSettings) -> PlanSettings:
    """Returns settings whose rows are no longer than the model takes."""
    return replace(settings, length=min(settings.length, _most_tokens(base) or settings.length))


def chosen(method: Method | str | Mapping[str, Any]) -> Method:
    """Returns a method of its settings, its name, or `{"name": …}`.

    Raises:
        SettingsError: there is none, naming the nearest.
    """
    if isinstance(method, Method):
        return method
    return method_of({"name": method} if isinstance(method, str) else method)


def _seconds(found: Simulated, settings: PlanSettings) -> float | None:
    speed = timing.speed(settings.device, settings.precision)
    if speed is None:
        return None
    return settings.accumulation * (found.flops / speed[0] + found.traffic / speed[1])


def _most_tokens(base: Base) -> int | None:
    """Returns how many tokens a model with learned positions has; those without have no end."""
    config = base.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    return int(limit) if limit and limit > 0 else None


def _check_length(base: Base, settings: PlanSettings) -> None:
    limit = _most_tokens(base)
    if limit is not None and settings.length > limit:
        raise SettingsError(
            f"length is {settings.length}, but {base.name} takes at most {limit} tokens."
        )


def dtype_of(settings: PlanSettings) -> torch.dtype:
    """Returns the type of the base's weights."""
    return getattr(torch, settings.precision)
