"""The bottleneck that all adapters between sublayers share, and where it may read and add.

    A(z) = s * (U phi(D z + c_D) + c_U)        D (k, d), U (d, k), k = d / reduction

Serial, x what the sublayer's answer h is added to, N the norm of post-norm blocks, else nothing:

    placement       reads z          model goes on with
    "simple"        h                N(x + h + A(h))
    "adapterhub"    N(x + h)         N(x + h + A(N(x + h)))
    "result"        N(x + h)         N(x + h) + A(N(x + h))
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftune.anatomy import Anatomy
from graftune.anatomy.ports import Sublayer, resolve_sublayers
from graftune.anatomy.tensors import resolve_norms
from graftune.errors import SettingsError
from graftune.methods._gate import GATES, add_gates
from graftune.methods._invertible import coupling_count, plan_coupling
from graftune.methods._maps import ACTIVATIONS, start_pair
from graftune.methods.base import Method
from graftune.sites import hosts
from graftune.sites.base import Bottleneck, Graft, Seen, SublayerDelta, SublayerPlace
from graftune.sites.parameter import own_value

KINDS = ("attention", "cross-attention", "ffn")
INITS = ("near-identity", "bert", "zero-up")
SKIPS = ("answer", "read", "sum")


class BottleneckDelta(SublayerDelta):
    """A serial or parallel bottleneck on one sublayer.

    Shapes: down (k, d), down_bias (k), up (d, k), up_bias (d); if asked for, scale (1) or (d),
    before_weight and before_bias (d), after_weight and after_bias (d); gate, see `Gate`.
    """

    down: nn.Parameter
    up: nn.Parameter

    def __init__(self, settings: BottleneckMethod, width: int, k: int, options: Any) -> None:
        super().__init__()
        self.source, self.skip = settings.source, settings.skip
        self.norms_sum = settings.norm_after and settings.norm_adds_skip
        self.phi, self.p = settings.activation, settings.dropout
        self.depth_p = settings.stochastic_depth
        self.s = settings.scale if isinstance(settings.scale, float | int) else 1.0
        for name, shape in settings.shapes(width, k).items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, **options)))
        self.learns_scale = isinstance(settings.scale, str)
        self.norm_before, self.norm_after = settings.norm_before, settings.norm_after
        self.gate_width = width
        self.add_module("gate", None)

    @property
    def reads(self) -> frozenset[str]:
        """See `SublayerDelta.reads`."""
        sums = {"residual", "norm"} if self.norm_follows else {"residual"}
        fields = {"input": {"input"}, "residual": {"residual"}, "sum": sums}.get(self.source, set())
        return frozenset(fields | ({"residual"} if self.skip == "sum" else set()))

    norm_follows: bool = False
    """Whether the sum of a post-norm block is normed before it is read."""

    def start(self, init: str) -> None:
        """Sets the initial values."""
        own = cast("dict[str, nn.Parameter]", self._parameters)
        for name, tensor in own.items():
            nn.init.zeros_(tensor)
            if name in ("scale", "before_weight", "after_weight"):
                nn.init.ones_(tensor)
        self.start_maps(init)

    def start_maps(self, init: str) -> None:
        """Sets the initial values of the two projections."""
        start_pair(self.down, self.up, init)

    def forward(self, h: Tensor, seen: Seen) -> Tensor:
        """See `SublayerDelta.forward`."""
        z = self.read(h, seen)
        change = self.change(z)
        if self.p and self.training:
            change = F.dropout(change, self.p)
        if self.depth_p and self.training:
            change = _row_dropped(change, self.depth_p)
        gate = self._modules["gate"]
        if gate is not None:
            change = change * gate(z)
        if self.norm_after and not self.norms_sum:
            change = self._normed(change, "after")
        if change.dtype is not h.dtype:
            change = change.to(h.dtype)
        added = self.added_to(h, z, seen) + change
        return self._normed(added, "after") if self.norms_sum else added

    def read(self, h: Tensor, seen: Seen) -> Tensor:
        """Returns z, `(..., d)`."""
        if self.source == "answer":
            return h
        if self.source == "sum":
            assert seen.residual is not None
            total = h + seen.residual
            return total if seen.norm is None or not self.norm_follows else seen.norm(total)
        z = seen.input if self.source == "input" else seen.residual
        assert z is not None
        return z

    def change(self, z: Tensor) -> Tensor:
        """Returns s (U phi(D z + c_D) + c_U), `(..., d)`."""
        own: Any = self._parameters  # not by attribute: a hot path
        down, up = self.maps()
        if z.dtype is not down.dtype:
            z = z.to(down.dtype)
        if self.norm_before:
            z = self._normed(z, "before")
        inner = ACTIVATIONS[self.phi](F.linear(z, down, own["down_bias"]))
        made = F.linear(inner, up, own["up_bias"])
        if self.learns_scale:
            return made * own["scale"]
        return made if self.s == 1.0 else made * self.s

    def maps(self) -> tuple[Tensor, Tensor]:
        """Returns D, `(k, d)`, and U, `(d, k)`."""
        own: Any = self._parameters
        return own["down"], own["up"]

    def added_to(self, h: Tensor, z: Tensor, seen: Seen) -> Tensor:
        """Returns what the change is added to."""
        if self.skip == "answer":
            return h
        if self.skip == "read":
            return z
        assert seen.residual is not None
        return h + seen.residual

    def bottleneck(self, h: Tensor, seen: Seen) -> Bottleneck:
        """See `SublayerDelta.bottleneck`: the change without dropout and gate."""
        z = self.read(h, seen)
        return Bottleneck(z, self.change(z), self.added_to(h, z, seen))

    def _normed(self, z: Tensor, which: str) -> Tensor:
        own: Any = self._parameters
        weight, bias = own[f"{which}_weight"], own[f"{which}_bias"]
        return F.layer_norm(z.to(weight.dtype), weight.shape, weight, bias).to(z.dtype)


@dataclass(frozen=True, kw_only=True)
class BottleneckMethod(Method):
    """What adapters with a bottleneck have in common."""

    default_lr: ClassVar[float] = 1e-3
    inits: ClassVar[tuple[str, ...]] = INITS

    sublayers: tuple[str, ...] = ("ffn",)
    """Which get one: "attention", "cross-attention", "ffn"."""
    reduction: float | dict[str, float] = 16
    """d over k; or by index of the block, "default" for the others."""
    bottleneck: int | None = None
    """k itself, in place of `reduction`."""
    activation: str = "relu"
    """phi: relu, gelu, gelu_tanh, silu, tanh, sigmoid, leaky_relu, elu or identity."""
    scale: float | str = 1.0
    """s: a number; "learned", one number that starts at 1; or "channel", one for each feature."""
    dropout: float = 0.0
    """Chance that a feature of the change is dropped in training."""
    stochastic_depth: float = 0.0
    """Chance that a row's whole change is dropped in training."""
    init: str = "zero-up"
    """Of D and U: "zero-up" equals the base, "near-identity" N(0, 0.01^2), "bert" N(0, 0.02^2)."""
    gate: str | None = None
    """Multiply the change by a gate: "token", "mean", "mean-padded" or "auto"; see `_gate`."""
    norm_before: bool = False
    """Put a trained LayerNorm before D."""
    norm_after: bool = False
    """Put a trained LayerNorm after U."""
    norm_adds_skip: bool = False
    """Let that norm see the sum, not the change alone."""
    layers: int | str | tuple[int, ...] | None = None
    """Blocks that get one: an index, a list, or a slice such as "6:"; None for all."""
    train_norms: bool = False
    """Train the model's own norms with it."""

    @property
    def source(self) -> str:
        """What the bottleneck reads: the answer, the sum, the sublayer's input or the residual."""
        raise NotImplementedError

    @property
    def skip(self) -> str:
        """What the change is added to, before the model adds the residual."""
        return "answer"

    def check(self) -> None:
        """See `Method.check`."""
        if not self.sublayers or len(set(self.sublayers)) < len(self.sublayers):
            raise SettingsError(
                f"{self.name}: sublayers is {list(self.sublayers)}, expected one or more different "
                f"of {', '.join(KINDS)}."
            )
        self._check_choice("sublayers", KINDS)
        self._check_choice("activation", tuple(ACTIVATIONS))
        self._check_choice("init", self.inits)
        if self.gate is not None:
            self._check_choice("gate", GATES)
        for field in ("dropout", "stochastic_depth"):
            self._check_number(field, 0, 1, open_high=True)
        if self.bottleneck is not None:
            self._check_number("bottleneck", 1)
        self._check_scale()
        self._check_reduction()
        if self.norm_adds_skip and not self.norm_after:
            raise SettingsError(f"{self.name}: norm_adds_skip needs norm_after=True.")

    def _check_scale(self) -> None:
        if isinstance(self.scale, str):
            self._check_choice("scale", ("learned", "channel"))
        elif not math.isfinite(self.scale):
            raise SettingsError(f"{self.name}: scale is {self.scale!r}, expected a finite number.")

    def _check_reduction(self) -> None:
        given = self.reduction
        values = given.values() if isinstance(given, Mapping) else (given,)
        if not all(math.isfinite(value) and value > 0 for value in values):
            raise SettingsError(
                f"{self.name}: reduction is {self.reduction!r}, expected more than 0."
            )

    def shapes(self, width: int, k: int) -> dict[str, tuple[int, ...]]:
        """Returns a delta's tensors and their shapes."""
        shapes: dict[str, tuple[int, ...]] = self.map_shapes(width, k)
        if isinstance(self.scale, str):
            shapes["scale"] = (1,) if self.scale == "learned" else (width,)
        for which, on in (("before", self.norm_before), ("after", self.norm_after)):
            if on:
                shapes |= {f"{which}_weight": (width,), f"{which}_bias": (width,)}
        return shapes

    def map_shapes(self, width: int, k: int) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of the two projections."""
        return {"down": (k, width), "down_bias": (k,), "up": (width, k), "up_bias": (width,)}

    def plan(self, model: nn.Module, anatomy: Anatomy, *, empty: bool = False) -> list[Graft]:
        """See `Method.plan`.

        Raises:
            SettingsError: a bottleneck without width, or a place that can't be read.
        """
        grafts = [self._graft(model, *found, empty) for found in self.places(model, anatomy)]
        if self.gate is not None:
            add_gates(self.gate, grafts, anatomy, empty)
        return grafts + [own_value(model, n, empty=empty) for n in self._norms(model, anatomy)]

    def count(self, model: nn.Module, anatomy: Anatomy) -> int:
        """See `Method.count`: 2 d k + d + k for each place, what else was asked for, norms."""
        places = sum(
            math.prod(shape)
            for sublayer, _, k in self.places(model, anatomy)
            for shape in self.shapes(sublayer.block.width, k).values()
        )
        if self.gate is not None:
            places += sum(s.block.width + 1 for s, _, _ in self.places(model, anatomy))
        norms = self._norms(model, anatomy)
        return places + sum(model.get_parameter(name).numel() for name in norms)

    def places(
        self, model: nn.Module, anatomy: Anatomy
    ) -> Iterator[tuple[Sublayer, SublayerPlace, int]]:
        """Yields each sublayer that gets a bottleneck, its place and k."""
        kinds = cast(Any, self.sublayers)
        for sublayer in resolve_sublayers(model, anatomy, kinds, self.layers):
            yield sublayer, self._place(sublayer), self._width(sublayer)

    def _width(self, sublayer: Sublayer) -> int:
        """Returns k."""
        if self.bottleneck is not None:
            return self.bottleneck
        by_block, index = self.reduction, str(sublayer.block.index)
        if isinstance(by_block, Mapping) and not {index, "default"} & by_block.keys():
            raise SettingsError(
                f'{self.name}: reduction has nothing for block {index}, and no "default".'
            )
        if isinstance(by_block, Mapping):
            by_block = by_block.get(index, by_block.get("default", 1))
        k = int(sublayer.block.width // by_block)
        if k < 1:
            raise SettingsError(
                f"{self.name}: reduction={by_block:g} of the width {sublayer.block.width} of "
                f"{sublayer.name} leaves no bottleneck: take at most {sublayer.block.width}."
            )
        return k

    def _place(self, sublayer: Sublayer) -> SublayerPlace:
        ports, module = sublayer.ports, sublayer.ports.answer
        if self.goes_last and ports.norm is not None:
            module = ports.norm
        needs_sum = self.source in ("residual", "sum") and module != ports.norm
        if ports.residual is None and (needs_sum or self.skip == "sum"):
            raise SettingsError(
                f"{self.name} reads what {sublayer.name} is added to, which no module here "
                f"sees as it is (its attention sees windows, or no norm comes first): {self.hint}."
            )
        return SublayerPlace(module, sublayer.name, ports.input, ports.residual, ports.norm)

    goes_last: ClassVar[bool] = False
    hint: ClassVar[str] = 'take placement="simple"'

    def _graft(
        self, model: nn.Module, sublayer: Sublayer, place: SublayerPlace, k: int, empty: bool
    ) -> Graft:
        options = hosts.delta_options(model.get_submodule(place.input))
        delta = self.delta(sublayer.block.width, k, options)
        if place.module == place.norm:  # what is read there is the sum already, normed
            delta.source, delta.skip = "answer", "answer"
        delta.norm_follows = place.norm is not None
        if not empty:
            delta.start(self.init)
        return Graft(place, delta)

    def delta(self, width: int, k: int, options: Any) -> BottleneckDelta:
        """Returns an empty delta."""
        return BottleneckDelta(self, width, k, options)

    def _norms(self, model: nn.Module, anatomy: Anatomy) -> tuple[str, ...]:
        return resolve_norms(model, anatomy, self.layers) if self.train_norms else ()


@dataclass(frozen=True, kw_only=True)
class SerialMethod(BottleneckMethod):
    """A bottleneck after its sublayer."""

    placement: str = "simple"
    """What is read and where it is added: "simple", "adapterhub" or "result"; see the formulas."""
    skips: str = "answer"
    """With "adapterhub", what the change is added to: "answer", what was "read", or the "sum"."""
    invertible: bool = False
    """Couple the token embeddings invertibly, and take it back before a language-model head."""
    invertible_reduction: float = 2
    """Half of d over the coupling's own k."""
    undo_at_head: bool = True
    """Take the coupling back before the language-model head."""

    @property
    def source(self) -> str:
        """See `BottleneckMethod.source`."""
        return "answer" if self.placement == "simple" else "sum"

    @property
    def skip(self) -> str:
        """See `BottleneckMethod.skip`."""
        return self.skips

    @property
    def goes_last(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether it acts on what the norm of a post-norm block answers."""
        return self.placement == "result"

    def check(self) -> None:
        """See `Method.check`."""
        super().check()
        self._check_choice("placement", ("simple", "adapterhub", "result"))
        self._check_choice("skips", SKIPS)
        if self.skips != "answer" and self.placement != "adapterhub":
            raise SettingsError(
                f'{self.name}: skips="{self.skips}" is for placement="adapterhub", found '
                f'placement="{self.placement}".'
            )
        self._check_number("invertible_reduction", 1e-3)

    def plan(self, model: nn.Module, anatomy: Anatomy, *, empty: bool = False) -> list[Graft]:
        """See `BottleneckMethod.plan`."""
        grafts = super().plan(model, anatomy, empty=empty)
        return grafts + plan_coupling(self, model, anatomy, empty) if self.invertible else grafts

    def count(self, model: nn.Module, anatomy: Anatomy) -> int:
        """See `Method.count`: as `BottleneckMethod.count`, and the coupling's."""
        coupling = coupling_count(self, model, anatomy) if self.invertible else 0
        return super().count(model, anatomy) + coupling


def _row_dropped(change: Tensor, p: float) -> Tensor:
    """Returns the change with whole rows of it dropped, the others as much larger."""
    keep = torch.empty((change.shape[0], *[1] * (change.ndim - 1)), device=change.device)
    return change * keep.bernoulli_(1 - p).div_(1 - p).to(change.dtype)
