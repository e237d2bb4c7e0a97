"""Which settings fit into a memory, and the best of them: least harm first.

What changes nothing but the time is tried first, and what changes numbers after it, each on top of
the one before, in the order of `LOSSY`. Within each, the batch is split into up to four that are
accumulated (the same gradient, nearly the same time); then activations are computed twice (the
same gradient, a third more time); then both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from graftune.errors import AnatomyError, SettingsError
from graftune.methods.base import Method
from graftune.planning.planned import Plan, chosen, planned
from graftune.planning.settings import PlanSettings
from graftune.planning.sizes import parse_bytes
from graftune.planning.skeletons import Base, base_of, can_checkpoint
from graftune.planning.tracking import OPTIMIZER, WEIGHTS
from graftune.tasks.settings import TrainSettings

MARGIN = 0.05
"""Share of a budget that is left free: what plans err by, and fragments."""
SPLITS = 4
"""Most batches that one is split into before activations are computed twice."""
WAY_ON = "Take a smaller base, shorter rows, or a method that keeps less, such as LadderSideTuning."
WORTH = 0.02
"""Share of the peak below which an optimizer's states aren't worth other ones."""

TRAIN_KEYS = {
    "batch_size": "batch_size",
    "accumulation": "accumulation",
    "precision": "precision",
    "optimizer": "optimizer",
    "gradient_checkpointing": "gradient_checkpointing",
    "quantize": "quantize",
    "double_quant": "double_quant",
    "loss_chunk": "loss_chunk",
}
"""A plan's settings and the keys of `train` in a settings file that say the same.

Only keys that `graftune train` has are proposed.
"""
OFFLOAD_KEYS = {"optimizer": "offload_optimizer", "activations": "offload_activations"}
"""What is offloaded, and the keys of `train` that say so."""
CHUNK = 512
"""Tokens of which logits and loss are computed at once, where that is proposed."""
LOSSY: tuple[dict[str, Any], ...] = (
    {"precision": "bfloat16"},
    {"optimizer": {"cuda": "adamw_8bit", "cpu": "adafactor"}},
    {"quantize": "int8"},
    {"quantize": "nf4"},
    {"double_quant": True},
)
"""Changes that cost precision, in the order in which they are made, each on top of the last."""


@dataclass(frozen=True)
class Fit:
    """The best settings found for a budget."""

    plan: Plan
    budget_bytes: int
    changes: tuple[str, ...]
    """What differs from what was asked, in words of settings."""
    tried: int
    """How many settings were planned."""

    def to_dict(self) -> dict[str, Any]:
        """Returns it as JSON-able values."""
        return {**dataclasses.asdict(self), "plan": self.plan.to_dict()}


def fit(
    model: Any,
    method: Method | str | Mapping[str, Any],
    budget: str | int,
    *,
    task: str | None = None,
    timed: bool = False,
    **settings: Any,
) -> Fit:
    """Returns the least harmful settings whose step fits into a memory.

    Args:
        model: as for `plan`.
        method: as for `plan`.
        budget: the device's memory, such as "8GiB".
        task: as for `plan`.
        timed: as for `plan`.
        settings: those of `PlanSettings` to begin with.

    Raises:
        SettingsError: nothing fits; it says what the least is. And as for `plan`.
    """
    size = parse_bytes(budget, "the budget")
    asked = PlanSettings.of(**settings)
    return fitted(base_of(model, task, asked.labels), chosen(method), asked, size, timed=timed)


def fitted(
    base: Base,
    method: Method,
    asked: PlanSettings,
    budget: int,
    *,
    timed: bool = False,
    way_on: str = WAY_ON,
) -> Fit:
    """Returns the least harmful settings of a configuration that fit; see `fit`.

    Args:
        base: a model's configuration.
        method: what trains.
        asked: the settings to begin with.
        budget: in bytes.
        timed: as for `plan`.
        way_on: what the error advises where nothing fits.
    """
    search = _Search(base, method, budget)
    for level in _levels(asked, search):
        found = search.best(level)
        if found is not None:
            if timed:
                found = planned(base, method, found.settings, timed=True)
            return Fit(found, budget, changes(asked, found.settings), search.tried)
    raise SettingsError(f"{_too_small(search, budget)} {way_on}")


def changes(asked: PlanSettings, found: PlanSettings) -> tuple[str, ...]:
    """Returns what differs between two settings, as `name=value`."""
    return tuple(
        f"{field.name}={getattr(found, field.name)}"
        for field in dataclasses.fields(PlanSettings)
        if getattr(asked, field.name) != getattr(found, field.name)
    )


def train_settings(settings: PlanSettings) -> dict[str, Any]:
    """Returns the `train` section of a settings file that says the same, defaults left out."""
    default = PlanSettings()
    keys = {name: key for name, key in TRAIN_KEYS.items() if key in TrainSettings.model_fields}
    always = ("batch_size", "precision", *(("double_quant",) * bool(settings.quantize)))
    moved = {
        key: True
        for word, key in OFFLOAD_KEYS.items()
        if word in settings.offload and key in TrainSettings.model_fields
    }
    return moved | {
        key: getattr(settings, name)
        for name, key in keys.items()
        if name in always or getattr(settings, name) != getattr(default, name)
    }


class _Search:
    """Plans settings, and keeps the one that needed least."""

    def __init__(self, base: Base, method: Method, budget: int) -> None:
        self.base, self.method, self.budget = base, method, budget
        self.tried = 0
        self.least: Plan | None = None
        self._kept: dict[PlanSettings, Plan] = {}

    def plan(self, settings: PlanSettings) -> Plan:
        """Returns the plan of settings, made once."""
        if settings not in self._kept:
            self.tried += 1
            self._kept[settings] = planned(self.base, self.method, settings)
        found = self._kept[settings]
        if self.least is None or found.peak_bytes < self.least.peak_bytes:
            self.least = found
        return found

    def fits(self, settings: PlanSettings) -> Plan | None:
        """Returns the plan of settings if it fits."""
        found = self.plan(settings)
        return found if found.peak_bytes <= self.budget * (1 - MARGIN) else None

    def best(self, level: PlanSettings) -> Plan | None:
        """Returns the first plan that fits among what changes time alone; None if none does."""
        first = self.fits(level)
        if first is not None:
            return first
        if self.fits(self.smallest(level)) is None:
            return None
        return next((found for one in self._exact(level) if (found := self.fits(one))), None)

    def smallest(self, level: PlanSettings) -> PlanSettings:
        """Returns the settings of the same gradient that need least."""
        return list(self._exact(level))[-1]

    def _exact(self, level: PlanSettings) -> Iterator[PlanSettings]:
        """Yields settings of the same gradient, fastest first, the smallest last."""
        parts = [n for n in range(1, level.batch_size + 1) if level.batch_size % n == 0]
        twice = can_checkpoint(self.base)
        ways = [level]
        if self.base.task == "causal-lm" and level.loss_chunk is None:
            ways.append(dataclasses.replace(level, loss_chunk=CHUNK))
        yield from (_split(way, n) for way in ways for n in parts if n <= SPLITS or not twice)
        if twice:
            again = [dataclasses.replace(way, gradient_checkpointing=True) for way in ways]
            yield from (_split(way, n) for way in again for n in parts)


def _split(settings: PlanSettings, parts: int) -> PlanSettings:
    return dataclasses.replace(
        settings,
        batch_size=settings.batch_size // parts,
        accumulation=settings.accumulation * parts,
    )


def _levels(asked: PlanSettings, search: _Search) -> Iterator[PlanSettings]:
    """Yields settings that cost ever more precision, leaving out what can't be or is no use."""
    level = asked
    yield level
    for change in LOSSY:
        values = {
            name: value[asked.device] if isinstance(value, dict) else value
            for name, value in change.items()
        }
        if not all(_is_proposed(name, level, search) for name in values):
            continue
        try:
            wider = dataclasses.replace(level, **values)
            search.plan(search.smallest(wider))
        except (SettingsError, AnatomyError):  # such as one that must read the weights it changes
            continue
        level = wider
        yield level


def _is_proposed(name: str, level: PlanSettings, search: _Search) -> bool:
    """Whether a change of a setting is possible in a run, and worth it."""
    if TRAIN_KEYS[name] not in TrainSettings.model_fields:
        return False
    if name == "precision":
        return level.precision == "float32"
    if name == "optimizer":
        states = search.plan(search.smallest(level))
        return states.parts[OPTIMIZER] > WORTH * states.peak_bytes
    return not search.method.trains_in_place


def _too_small(search: _Search, budget: int) -> str:
    least = search.least
    assert least is not None
    weights = least.parts[WEIGHTS] + least.parts["adapter"]
    said = ", ".join(changes(PlanSettings(device=least.settings.device), least.settings))
    why = (
        f"its weights alone take {_gib(weights)}"
        if weights > budget
        else f"the least that a step takes is {_gib(least.peak_bytes)} ({said}), and "
        f"{MARGIN:.0%} are left free"
    )
    return f"{search.base.name} with {search.method.name} doesn't fit into {_gib(budget)}: {why}."


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
