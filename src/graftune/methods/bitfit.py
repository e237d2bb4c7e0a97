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

from graftune.anatomy import Anatomy, resolve, resolve_biases, resolve_norms
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

    train_norms: bool = False
    """Train the norms' weights too, as T-Few's comparison does on T5, with `add_missing`."""

    def plan(self, model: nn.Module, anatomy: Anatomy, *, empty: bool = False) -> list[Graft]:
        """See `Method.plan`.

        Raises:
            SettingsError: if the model has none of these biases and `add_missing` is off.
        """
        missing = self._missing(model, anatomy)
        try:
            names = self._names(model, anatomy, missing)
        except AnatomyError as error:
            raise SettingsError(f"BitFit: {error}{self._advice(anatomy)}") from error
        return [
            _zeros(model, name) if name in missing else own_value(model, name, empty=empty)
            for name in names
        ]

    def count(self, model: nn.Module, anatomy: Anatomy) -> int:
        """See `Method.count`: the widths of the biases (and of the norms)."""
        missing = self._missing(model, anatomy)
        try:
            names = self._names(model, anatomy, missing)
        except AnatomyError:
            return 0
        places = [ParameterPlace(n.rpartition(".")[0], n.rpartition(".")[2]) for n in names]
        return sum(place.size(model.get_submodule(place.module)) for place in places)

    def _names(self, model: nn.Module, anatomy: Anatomy, missing: list[str]) -> tuple[str, ...]:
        biases = resolve_biases(anatomy, self.subset, self.layers, missing)
        if not self.train_norms:
            return biases
        return tuple(dict.fromkeys((*biases, *resolve_norms(model, anatomy, self.layers))))

    def _missing(self, model: nn.Module, anatomy: Anatomy) -> list[str]:
        """Returns the names of the biases that linears of attention and FFN could be given."""
        if not self.add_missing:
            return []
        modules = dict.fromkeys(p.module for p in resolve(model, anatomy, "blocks"))
        return [f"{m}.bias" for m in modules if _lacks_bias(model.get_submodule(m))]

    def _advice(self, anatomy: Anatomy) -> str:
        heads = tuple(f"{head}." for head in anatomy.heads)
        if self.add_missing or not all(name.startswith(heads) for name in anatomy.biases):
            return ""
        return (
            " Set add_missing=True to give linears without a bias one, or take another method, "
            "such as LoRA."
        )


def _lacks_bias(host: nn.Module) -> bool:
    return "bias" in host._parameters and host._parameters["bias"] is None


def _zeros(model: nn.Module, name: str) -> Graft:
    module, _, parameter = name.rpartition(".")
    host = model.get_submodule(module)
    zeros = torch.zeros(hosts.features(host)[1], **hosts.delta_options(host))  # type: ignore[call-overload]
    return Graft(ParameterPlace(module, parameter), OwnValue(zeros))
