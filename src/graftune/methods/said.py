"""SAID: theta_i = theta0_i + lambda_i * M_i z, all tensors moved by one short vector z.

    z (d - m) ──┬── M_1 (fixed, random) ── * lambda_1 ──> tensor 1      z: zeros
                ├── ...                                                 lambda: ones, one for each
                └── M_m (fixed, random) ── * lambda_m ──> tensor m      of the m tensors

Aghajanyan, Zettlemoyer and Gupta 2020 (arXiv 2012.13255, section 3), M_i a Fastfood transform (see
`graftune.kernels.fastfood`). Identity at init: yes, bit for bit. Merge: theta itself. Count: d.
`structure_aware=False` has no lambdas: DID, the intrinsic dimension of Li et al. 2018 (arXiv
1804.08838).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from graftune.anatomy import Anatomy, resolve_tensors
from graftune.anatomy.modules import is_in
from graftune.errors import SettingsError
from graftune.kernels.fastfood import Fastfood
from graftune.methods.base import Method, register
from graftune.sites import hosts
from graftune.sites.base import Graft, ParameterDelta, ParameterPlace
from graftune.sites.parameter import base_parameters

Targets = str | tuple[str, ...]
Layers = int | str | tuple[int, ...] | None


class Intrinsic(nn.Module):
    """What all tensors of an adapter are moved by. Shape: intrinsic (d - m,)."""

    def __init__(self, intrinsic: Tensor) -> None:
        super().__init__()
        self.intrinsic = nn.Parameter(intrinsic)


class Projected(ParameterDelta):
    """theta + lambda * M z. Shapes: common.intrinsic (d - m,), lam () or absent.

    `projection` is drawn anew from the seed wherever the adapter is made; no file holds it. Of a
    new head, whose values are in no other file either, it keeps theta0 as `start`.
    """

    lam: nn.Parameter | None
    start: Tensor | None

    def __init__(
        self,
        common: Intrinsic,
        lam: Tensor | None,
        projection: Fastfood | None,
        start: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.common = common
        self.register_parameter("lam", None if lam is None else nn.Parameter(lam))
        self.register_buffer("start", start)
        self.projection = projection

    def forward(self, value: Tensor | None, base: Tensor | None) -> Tensor:
        """See `ParameterDelta.forward`; lambda * z is projected, so that no M z is kept for it."""
        assert value is not None
        assert self.projection is not None
        z = self.common.intrinsic if self.lam is None else self.lam * self.common.intrinsic
        change = self.projection(z.to(value.device)).reshape(value.shape)
        start = value if self.start is None else self.start
        return (start + change).to(value.dtype)


@register
@dataclass(frozen=True, kw_only=True)
class SAID(Method):
    """Trains d numbers that a fixed random projection spreads over the model's tensors.

    Training costs the memory of full fine-tuning and more time: each tensor is projected anew in
    each pass. Merge it to serve it.
    """

    name: ClassVar[str] = "SAID"
    paper: ClassVar[str] = (
        "Aghajanyan et al. 2020, Intrinsic Dimensionality Explains the Effectiveness of Language "
        "Model Fine-Tuning"
    )
    summary: ClassVar[str] = "A vector of d numbers, projected at random onto every tensor; merges."
    default_lr: ClassVar[float] = 1e-2
    mixes_rows: ClassVar[bool] = False

    d: int = 10_000
    """Intrinsic dimension: all that is trained and stored, the lambdas among them."""
    structure_aware: bool = True
    """Give each tensor a trained scale of its own (SAID); without, it is DID."""
    targets: Targets = "all"
    """The model's tensors that are moved: words, names or a regular expression."""
    layers: Layers = None
    """Blocks whose tensors are moved; None for all, and those outside blocks."""
    exclude: Targets = ()
    """Tensors left out, written like the targets."""
    project_head: bool = False
    """Move a new head by the d numbers too, instead of training it beside them; its start is then
    kept in the file."""
    seed: int = 0
    """What the projections are drawn from."""

    def check(self) -> None:
        """See `Method.check`."""
        self._check_number("d", 1)
        self._check_number("seed", 0, 2**31 - 1)

    def plan(self, model: nn.Module, anatomy: Anatomy, *, empty: bool = False) -> list[Graft]:
        """See `Method.plan`.

        Raises:
            SettingsError: d is larger than what it is projected to, or leaves no vector beside the
                lambdas.
        """
        tensors = self._tensors(model, anatomy)
        width = self._width(tensors)
        first = next(iter(tensors.values()))
        common = Intrinsic(torch.zeros(width, device=first.device))
        return [
            self._graft(model, name, common, self.seed + at, is_new=is_in(name, anatomy.new_heads))
            for at, name in enumerate(tensors)
        ]

    def count(self, model: nn.Module, anatomy: Anatomy) -> int:
        """See `Method.count`: d. Raises what `plan` raises for sizes."""
        self._width(self._tensors(model, anatomy))
        return self.d

    def _tensors(self, model: nn.Module, anatomy: Anatomy) -> dict[str, nn.Parameter]:
        names = resolve_tensors(model, anatomy, self.targets, self.layers, self.exclude)
        if self.project_head:
            new = [n for n in base_parameters(model) if is_in(n, anatomy.new_heads)]
            names = tuple(dict.fromkeys((*names, *new)))
        return {name: model.get_parameter(name) for name in names}

    def _width(self, tensors: dict[str, nn.Parameter]) -> int:
        """Returns the length of the vector that is projected."""
        size = sum(tensor.numel() for tensor in tensors.values())
        if self.d > size:
            raise SettingsError(
                f"SAID: d is {self.d:,}, but the targets have only {size:,} parameters to project "
                "it to; take a smaller d."
            )
        scales = len(tensors) if self.structure_aware else 0
        if self.d <= scales:
            raise SettingsError(
                f"SAID: d is {self.d:,}, of which the {scales} tensors' own scales take {scales}; "
                f"take at least {scales + 1}, fewer targets, or structure_aware=False."
            )
        return self.d - scales

    def _graft(
        self, model: nn.Module, name: str, common: Intrinsic, seed: int, *, is_new: bool
    ) -> Graft:
        module, _, parameter = name.rpartition(".")
        tensor = model.get_parameter(name)
        options = hosts.delta_options(model.get_submodule(module), parameter)
        lam = torch.ones((), **options) if self.structure_aware else None
        start = tensor.detach().to(**options, copy=True) if is_new else None
        projection = None
        if not tensor.is_meta:
            width = common.intrinsic.numel()
            projection = Fastfood(width, tensor.numel(), seed, tensor.device)
        return Graft(ParameterPlace(module, parameter), Projected(common, lam, projection, start))
