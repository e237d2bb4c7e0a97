"""Full fine-tuning: theta <- theta - lr * grad, for every parameter. The reference of all others.

    init: theta itself; identity at init: yes.
    trained, changed, stored: all of the base.

It trains in place, without a second copy of the model, so that its memory is the honest reference;
then it can't be switched off. `keep_base=True` trains a copy beside the base instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from graftune.anatomy import Anatomy
from graftune.anatomy.packed import is_packed
from graftune.errors import SettingsError
from graftune.methods.base import Method, register
from graftune.sites.base import Graft
from graftune.sites.parameter import base_parameters, own_value


@register
@dataclass(frozen=True, kw_only=True)
class FullFineTuning(Method):
    """Trains every parameter of the model.

    Count: the base's. Merge: nothing to merge in place; with `keep_base`, the values are written.
    """

    name: ClassVar[str] = "FullFineTuning"
    summary: ClassVar[str] = "Every parameter is trained: the accuracy and cost reference."
    default_lr: ClassVar[float] = 5e-5
    mixes_rows: ClassVar[bool] = False

    keep_base: bool = False
    """Train a copy, so that the base stays as it was and the adapter can be switched off."""

    @property
    def trains_in_place(self) -> bool:
        """Whether the base's own tensors are trained."""
        return not self.keep_base

    def plan(self, model: nn.Module, anatomy: Anatomy, *, empty: bool = False) -> list[Graft]:
        """Returns a copy of every parameter with `keep_base`, else nothing.

        Raises:
            SettingsError: the base is quantised.
        """
        packed = [name for name, tensor in base_parameters(model).items() if is_packed(tensor)]
        if packed:
            raise SettingsError(
                f"FullFineTuning trains every tensor, and {len(packed)} of the base's are "
                f"quantised, such as {packed[0]}: load the base in 16 or 32 bit, or take a method "
                "that trains beside them, as LoRA does."
            )
        if not self.keep_base:
            return []
        return [own_value(model, name, empty=empty) for name in base_parameters(model)]

    def count(self, model: nn.Module, anatomy: Anatomy) -> int:
        """See `Method.count`: all of the model, its head included."""
        return sum(parameter.numel() for parameter in base_parameters(model).values())
