"""BitFit: only the bias vectors are trained (Ben Zaken et al. 2021, arXiv 2106.10199).

    y = W x + b,   b trained, W frozen;   and the biases (beta) of the layer norms

Initial values: the base's own. Identity at init: yes, bit for bit. Count: the biases' entries.
The bias of keys gets no gradient in softmax attention: it moves every score of a query alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from graftune.anatomy import Anatomy, resolve, resolve_biases
from graftune.errors import AnatomyError, SettingsError
from graftune.methods.base import Method, register
from graftune.sites import hosts
from graftune.sites.base import Graft, ParameterPlace
from graftune.sites.parameter import OwnValue, own_value


@register
@dataclass(frozen=True, kw_only=True)
class BitFit(Method):
    """Trains the model's bias vectors.

    Merge: the trained biases take the place of the base's.
    """

    name: ClassVar[str] = "BitFit"
    paper: ClassVar[str] = (
        "Ben Zaken et al. 2021, BitFit: Simple Parameter-efficient Fine-tuning for "
        "Transformer-based Masked Language-models"
    )
    summary: ClassVar[str] = "Only the bias vectors are trained."
    default_lr: ClassVar[float] = 1e-3

    subset: str = "all"
    """Which: "all", "no-norm", "query+intermediate" (the two that move most), or a pattern."""
    layers: int | str | tuple[int, ...] | None = None
    """Blocks whose biases are trained; None for all, and those outside blocks."""
    add_missing: bool = False
    """Give linears of attention and FFN that have no bias one that starts at zero."""

    def plan(self, model: nn.Module, anatomy: Anatomy, *, empty: bool = False) -> list[Graft]:
        """See `Method.plan`.

        Raises:
            SettingsError: if the model has none of these biases and `add_missing` is off.
        """
        missing = self._missing(model, anatomy) if self.add_missing else []
        try:
            names = resolve_biases(anatomy, self.subset, self.layers)
        except AnatomyError as error:
            if missing:
                return missing
            raise SettingsError(
                f"BitFit: {error} Set add_missing=True to give linears without a bias one, or take "
                "another method, such as LoRA."
            ) from error
        return [own_value(model, name, empty=empty) for name in names] + missing

    def count(self, model: nn.Module, anatomy: Anatomy) -> int:
        """See `Method.count`: the widths of the biases."""
        try:
            names = resolve_biases(anatomy, self.subset, self.layers)
        except AnatomyError:
            names = ()
        present = sum(model.get_parameter(name).shape[0] for name in names)
        missing = self._missing(model, anatomy) if self.add_missing else []
        widths = (hosts.features(model.get_submodule(g.place.module))[1] for g in missing)
        return present + sum(widths)

    def _missing(self, model: nn.Module, anatomy: Anatomy) -> list[Graft]:
        grafts: list[Graft] = []
        for module in dict.fromkeys(
            p.module for p in resolve(model, anatomy, "blocks", self.layers)
        ):
            host = model.get_submodule(module)
            if "bias" not in host._parameters or host._parameters["bias"] is not None:
                continue
            zeros = torch.zeros(hosts.features(host)[1], **hosts.delta_options(host))  # type: ignore[call-overload]
            grafts.append(Graft(ParameterPlace(module, "bias"), OwnValue(zeros)))
        return grafts
