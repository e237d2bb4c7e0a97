"""A method made of methods: one adapter, one name, the deltas of every part in it.

    hybrid = part_1 + part_2 + ...      each at places of its own; counts add up

What a method does besides, penalties, schedules, a last form, each part does for its own deltas.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from graftune.anatomy import Anatomy
from graftune.errors import SettingsError
from graftune.methods.base import HeatMap, Method
from graftune.sites.base import Graft, LinearPlace, ParameterPlace, Place


class Hybrid(Method):
    """What methods made of others have in common; a subclass says what its parts are."""

    @property
    def parts(self) -> tuple[Method, ...]:
        """The methods that it is made of, in the order in which they are put in."""
        raise NotImplementedError

    @property
    def mixes_rows(self) -> bool:  # type: ignore[override]  # pyright: ignore[reportIncompatibleVariableOverride]
        """See `Method.mixes_rows`: if all parts do."""
        return all(part.mixes_rows for part in self.parts)

    @property
    def prunes(self) -> bool:  # type: ignore[override]  # pyright: ignore[reportIncompatibleVariableOverride]
        """See `Method.prunes`: if a part does."""
        return any(part.prunes for part in self.parts)

    def plan(self, model: nn.Module, anatomy: Anatomy, *, empty: bool = False) -> list[Graft]:
        """See `Method.plan`.

        Raises:
            SettingsError: two parts claim one place.
        """
        return self.joined([part.plan(model, anatomy, empty=empty) for part in self.parts])

    def plan_saved(
        self, model: nn.Module, anatomy: Anatomy, tensors: Mapping[str, Tensor]
    ) -> list[Graft]:
        """See `Method.plan_saved`."""
        return self.joined([part.plan_saved(model, anatomy, tensors) for part in self.parts])

    def joined(self, planned: list[list[Graft]]) -> list[Graft]:
        """Returns the grafts of all parts, each marked with its part's number.

        Raises:
            SettingsError: two parts claim one place.
        """
        claims: dict[Any, int] = {}
        for number, grafts in enumerate(planned):
            for graft in grafts:
                graft.part = number
                first = claims.setdefault(_claim(graft.place), number)
                if first != number:
                    names = [self.parts[n].name for n in (first, number)]
                    raise SettingsError(
                        f"{self.name}: {' and '.join(names)} both change {graft.place.key}, where "
                        "one adapter has room for one change: attach them as two adapters, and "
                        "activate gt.Stack of them."
                    )
        return [graft for grafts in planned for graft in grafts]

    def count(self, model: nn.Module, anatomy: Anatomy) -> int:
        """See `Method.count`: the sum of the parts' counts."""
        return sum(part.count(model, anatomy) for part in self.parts)

    def alone(self, adapter: Any) -> list[Any]:
        """Returns each part's share of an adapter, as an adapter of that part."""
        shares: list[Any] = []
        for number, part in enumerate(self.parts):
            grafts = [graft for graft in adapter.grafts if graft.part == number]
            share = type(adapter)(adapter.name, part, adapter.model, grafts, ())
            share.trainable, share.total_steps = adapter.trainable, adapter.total_steps
            shares.append(share)
        return shares

    def needs_steps(self, adapter: Any) -> bool:
        """See `Method.needs_steps`."""
        return any(share.method.needs_steps(share) for share in self.alone(adapter))

    def check_steps(self, total: int) -> None:
        """See `Method.check_steps`."""
        for part in self.parts:
            part.check_steps(total)

    def penalty(self, adapter: Any) -> Tensor | None:
        """See `Method.penalty`: the sum of the parts' penalties."""
        found = [share.method.penalty(share) for share in self.alone(adapter)]
        real = [penalty for penalty in found if penalty is not None]
        return torch.stack(real).sum() if real else None

    def advance(self, adapter: Any, step: int, total: int) -> None:
        """See `Method.advance`."""
        for share in self.alone(adapter):
            share.method.advance(share, step, total)

    def changes_at_the_end(self, adapter: Any) -> bool:
        """See `Method.changes_at_the_end`."""
        return any(share.method.changes_at_the_end(share) for share in self.alone(adapter))

    def finish(self, adapter: Any) -> None:
        """See `Method.finish`."""
        for share in self.alone(adapter):
            share.method.finish(share)

    def heat_maps(self, adapter: Any) -> list[HeatMap]:
        """See `Method.heat_maps`."""
        return [m for share in self.alone(adapter) for m in share.method.heat_maps(share)]

    def param_groups(self, adapter: Any, lr: float) -> list[dict[str, Any]] | None:
        """See `Method.param_groups`: those of the parts that have some."""
        found = [share.method.param_groups(share, lr) or [] for share in self.alone(adapter)]
        return [group for groups in found for group in groups] or None


def _claim(place: Place) -> tuple[str, str, Any]:
    """Returns what a place can be had by one delta of."""
    if isinstance(place, ParameterPlace):
        return place.module, "parameter", place.parameter
    if isinstance(place, LinearPlace):
        return place.module, place.site, place.rows
    return place.module, place.site, None


def check_parts(name: str, parts: tuple[Method, ...]) -> None:
    """Raises SettingsError for parts that can't be one adapter together."""
    if not parts:
        raise SettingsError(f"{name}: methods is empty, expected the methods that it is made of.")
    for part in parts:
        if part.trains_in_place or part.fuses or isinstance(part, Hybrid):
            raise SettingsError(f"{name}: {part.name} can't be a part of another method.")
        if part.train_head is not None:
            raise SettingsError(
                f"{name}: train_head is set on its part {part.name}; set it on {name} itself."
            )
    twice = [kind for kind, times in Counter(part.name for part in parts).items() if times > 1]
    if twice and len({repr(part) for part in parts}) < len(parts):
        raise SettingsError(f"{name}: {twice[0]} is named twice with the same settings.")
