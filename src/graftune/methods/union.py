"""Union: several methods in one adapter, any of them, gated or not.

    gt.Union(methods=(gt.PrefixTuning(length=30), gt.ParallelAdapter(scale=4)))     MAM, by hand

The unified view of He et al. 2022 (arXiv 2110.04366): what a method computes, where it is put in,
what it changes and how it is added can each be chosen; MAM and UniPELT are two points of the space.
Identity at init, merge, count: as the parts have them; the count is the sum.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from graftune.anatomy import Anatomy
from graftune.errors import SettingsError
from graftune.methods._hybrid import Hybrid, check_parts
from graftune.methods.base import Method, register
from graftune.sites.base import Graft


@register
@dataclass(frozen=True, kw_only=True)
class Union(Hybrid):
    """Several methods that are trained, saved and switched as one adapter.

    Merge: if every part merges.
    """

    name: ClassVar[str] = "Union"
    paper: ClassVar[str] = (
        "He et al. 2022, Towards a Unified View of Parameter-Efficient Transfer Learning"
    )
    summary: ClassVar[str] = "Several methods in one adapter."
    default_lr: ClassVar[float] = 5e-4

    methods: tuple[Any, ...] = ()
    """The parts: methods, or mappings such as {"method": "LoRA", "r": 4}."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "methods", tuple(_method(part) for part in self.methods))
        super().__post_init__()

    @property
    def parts(self) -> tuple[Method, ...]:
        """See `Hybrid.parts`."""
        return self.methods

    def check(self) -> None:
        """See `Method.check`."""
        check_parts(self.name, self.parts)

    @property
    def needs_data(self) -> bool:
        """See `Method.needs_data`: if a part does."""
        return any(part.needs_data for part in self.parts)

    def plan_on(
        self, model: nn.Module, anatomy: Anatomy, data: Iterable[Mapping[str, Tensor]]
    ) -> tuple[Method, list[Graft]]:
        """See `Method.plan_on`."""
        batches, parts, planned = list(data), list[Method](), list[list[Graft]]()
        for part in self.parts:
            found = part.plan_on(model, anatomy, batches) if part.needs_data else None
            parts.append(part if found is None else found[0])
            planned.append(part.plan(model, anatomy) if found is None else found[1])
        made = dataclasses.replace(self, methods=tuple(parts))
        return made, made.joined(planned)

    def to_dict(self) -> dict[str, Any]:
        """See `Method.to_dict`."""
        return {
            "method": self.name,
            "train_head": list(self.train_head)
            if isinstance(self.train_head, tuple)
            else self.train_head,
            "methods": [part.to_dict() for part in self.parts],
        }


def _method(part: Any) -> Method:
    """Returns a part, from a mapping if need be.

    Raises:
        SettingsError: it is neither, or names no method.
    """
    if isinstance(part, Method):
        return part
    if not isinstance(part, Mapping) or not {"method", "name"} & part.keys():
        raise SettingsError(
            f'Union: {part!r} is no method, expected one or a mapping such as {{"method": "LoRA"}}.'
        )
    settings = dict(part)
    if "method" not in settings:
        settings["method"] = settings.pop("name")
    return Method.from_dict(settings)
