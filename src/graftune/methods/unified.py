"""The unified view as one method: each point of its space by four words (He et al. 2022).

    Delta h = f(x W_down) W_up        f: softmax, relu, gelu, linear; k features between
    h <- h + s Delta h                h: a single matrix's answer, a sublayer's, or each head's

    parallel    x is what makes h        sequential    x is h itself
    head        x W_down = q P_k^T, the model's own queries; W_up = P_v; one pair for each head

Points that are methods are those methods, bit for bit; the others are here. Initial values: W_down
Kaiming uniform, W_up = 0; those of a method are its own. Merge: where a method merges. Count: that
of the point. arXiv 2110.04366, table 1 and section 3.3; multi-head adapters read queries as the
authors' code does (`cross_attn_relu`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftune.anatomy import Anatomy, Projection, resolve
from graftune.errors import SettingsError
from graftune.methods._attentions import Attention, attentions
from graftune.methods._gate import Gate, add_gates
from graftune.methods._hybrid import Hybrid
from graftune.methods._maps import ACTIVATIONS, start_pair
from graftune.methods.base import Method, register
from graftune.methods.houlsby import HoulsbyAdapter
from graftune.methods.lora import LoRA
from graftune.methods.parallel import ParallelAdapter
from graftune.methods.prefix import KINDS, PrefixTuning
from graftune.sites import hosts
from graftune.sites.base import AttentionDelta, Graft, LinearDelta, LinearPlace

FORMS = ("softmax", "relu", "gelu", "linear")
INSERTIONS = ("parallel", "sequential")
LOCATIONS = ("matrix", "attention", "ffn", "head")
COMPOSITIONS = ("add", "scaled", "gated")
SCALE = 4.0
"""s of "scaled" unless told, as the paper has it beside the feed-forward."""

Layers = int | str | tuple[int, ...] | None


@register
@dataclass(frozen=True, kw_only=True)
class UnifiedAdapter(Hybrid):
    """A change of the model by its form, insertion, location and composition.

    Merge: if the point is LoRA without a gate.
    """

    name: ClassVar[str] = "UnifiedAdapter"
    paper: ClassVar[str] = (
        "He et al. 2022, Towards a Unified View of Parameter-Efficient Transfer Learning"
    )
    summary: ClassVar[str] = "Any point of the unified view: form, insertion, place, composition."

    form: str = "relu"
    """f: "softmax", "relu", "gelu" or "linear"."""
    insertion: str = "parallel"
    """What is read: "parallel", what makes h; "sequential", h."""
    location: str = "ffn"
    """What h is: the answer of a "matrix", of "attention" or "ffn", or of each "head"."""
    composition: str = "scaled"
    """"add"; "scaled" by s; "gated" by the input: by the shared softmax, or s G(x), see `_gate`."""
    scale: float | None = None
    """s; None for 4 where it is "scaled", else 1."""
    k: int = 16
    """Features between the two maps: a rank, a bottleneck's width, or virtual tokens."""
    targets: str | tuple[str, ...] | None = None
    """Of "matrix": roles, module names or a regular expression; None for LoRA's "blocks"."""
    layers: Layers = None
    """Blocks to change: an index, a list, or a slice such as "6:"; None for all."""

    @property
    def s(self) -> float:
        """What multiplies the change."""
        if self.scale is not None:
            return float(self.scale)
        return SCALE if self.composition == "scaled" else 1.0

    @property
    def parts(self) -> tuple[Method, ...]:
        """See `Hybrid.parts`: the method of the point."""
        make = {"matrix": self._matrix, "head": self._head}.get(self.location, self._sublayer)
        return (make(),)

    def check(self) -> None:
        """See `Method.check`."""
        self._check_choice("form", FORMS)
        self._check_choice("insertion", INSERTIONS)
        self._check_choice("location", LOCATIONS)
        self._check_choice("composition", COMPOSITIONS)
        self._check_number("k", 1)
        why = _refusal(self)
        if why is not None:
            raise SettingsError(
                f'{self.name}: form="{self.form}", insertion="{self.insertion}", location='
                f'"{self.location}", composition="{self.composition}": {why}'
            )
        assert self.parts

    @property
    def _gate(self) -> str | None:
        return "auto" if self.composition == "gated" else None

    @property
    def _phi(self) -> str:
        return "identity" if self.form == "linear" else self.form

    def _matrix(self) -> Method:
        targets = "blocks" if self.targets is None else self.targets
        if self.form == "linear" and self.insertion == "parallel":
            return LoRA(
                r=self.k,
                alpha=self.s * self.k,
                targets=targets,
                layers=self.layers,
                gate=self._gate,
                gate_times_scale=self._gate is not None,
            )
        return _Matrices(
            phi=self._phi,
            is_sequential=self.insertion == "sequential",
            s=self.s,
            k=self.k,
            gate=self._gate,
            targets=targets,
            layers=self.layers,
        )

    def _sublayer(self) -> Method:
        kinds = ("ffn",) if self.location == "ffn" else KINDS
        common: dict[str, Any] = {
            "sublayers": kinds,
            "bottleneck": self.k,
            "activation": self._phi,
            "scale": self.s,
            "gate": self._gate,
            "layers": self.layers,
        }
        if self.insertion == "sequential":
            return HoulsbyAdapter(**common, train_norms=False)
        return ParallelAdapter(**common)

    def _head(self) -> Method:
        if self.composition == "gated":
            return PrefixTuning(length=self.k, hidden=None, layers=self.layers)
        return _Heads(phi=self._phi, s=self.s, k=self.k, layers=self.layers)


def _refusal(point: UnifiedAdapter) -> str | None:
    """Returns why there is no such point; None where there is."""
    is_head = point.location == "head"
    if point.form == "softmax" and not is_head:
        return 'a softmax shares attention among keys, which heads alone have: location="head".'
    if is_head and point.insertion == "sequential":
        return (
            "what heads answer goes straight into the output projection; to read it, take "
            'location="matrix" with targets="output", or location="attention" after it.'
        )
    if is_head and point.composition == "gated" and point.form != "softmax":
        return (
            "at a head the gate is the share of one softmax over the prefix and the text, which "
            f'form="{point.form}" has not: take "add" or "scaled".'
        )
    if is_head and point.composition == "gated" and point.s != 1:
        return f"the softmax alone weighs a prefix, but scale is {point.scale}: leave it out."
    if point.composition == "add" and point.s != 1:
        return f'"add" has no scale, but scale is {point.scale}: take "scaled".'
    if point.targets is not None and point.location != "matrix":
        return (
            f'targets is {point.targets!r}, which chooses matrices: take location="matrix", or '
            "leave it out."
        )
    return None


class HeadChange(AttentionDelta):
    """Delta h of each head, f(q P_k^T) P_v. Shapes: P_k (H, k, D), P_v (H, k, D)."""

    P_k: nn.Parameter
    P_v: nn.Parameter

    def __init__(self, shape: tuple[int, int, int], phi: str, s: float, options: Any) -> None:
        super().__init__()
        self.phi, self.s = phi, s
        self.P_k = nn.Parameter(torch.empty(shape, **options))
        self.P_v = nn.Parameter(torch.empty(shape, **options))

    def added(self, query: Tensor, module: nn.Module, scaling: float | None) -> Tensor:
        """See `AttentionDelta.added`."""
        P_k, P_v = self.P_k.to(query.dtype), self.P_v.to(query.dtype)
        scores = query @ P_k.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        inner = scores.softmax(-1) if self.phi == "softmax" else ACTIVATIONS[self.phi](scores)
        return (self.s * (inner @ P_v)).transpose(1, 2)  # (B, q, H, D)


@dataclass(frozen=True, kw_only=True)
class _Heads(Method):
    """Adapters of single heads: multi-head parallel adapters, and prefixes with a softmax apart."""

    name: ClassVar[str] = "UnifiedAdapter"

    phi: str
    s: float
    k: int
    layers: Layers = None

    def plan(self, model: nn.Module, anatomy: Anatomy, *, empty: bool = False) -> list[Graft]:
        """See `Method.plan`."""
        grafts: list[Graft] = []
        for one in attentions(self.name, model, anatomy, KINDS, self.layers):
            delta = HeadChange((one.heads, self.k, one.size), self.phi, self.s, one.options)
            if not empty:
                for down, up in zip(delta.P_k.data, delta.P_v.data, strict=True):
                    start_pair(down, up, "zero-up")
            grafts.append(Graft(one.place, delta))
        return grafts

    def count(self, model: nn.Module, anatomy: Anatomy) -> int:
        """See `Method.count`: 2 k d for each attention, d the width of its queries."""
        found: list[Attention] = list(attentions(self.name, model, anatomy, KINDS, self.layers))
        return sum(2 * self.k * one.heads * one.size for one in found)


class MatrixChange(LinearDelta):
    """Delta h of one matrix, f(z D^T) U^T. Shapes: down (k, in) or (k, out), up (out, k)."""

    down: nn.Parameter
    up: nn.Parameter

    def __init__(self, down: Tensor, up: Tensor, settings: _Matrices) -> None:
        super().__init__()
        self.phi, self.s, self.is_sequential = settings.phi, settings.s, settings.is_sequential
        self.down, self.up = nn.Parameter(down), nn.Parameter(up)
        self.gate_width = down.shape[1]
        self.add_module("gate", None)

    def forward(self, x: Tensor, y: Tensor, host: nn.Module) -> Tensor:
        """See `LinearDelta.forward`."""
        z = (y if self.is_sequential else x).to(self.down.dtype)
        change = F.linear(ACTIVATIONS[self.phi](F.linear(z, self.down)), self.up) * self.s
        gate = self._modules["gate"]
        if gate is not None:
            change = change * cast(Gate, gate)(z)
        return y + change.to(y.dtype)


@dataclass(frozen=True, kw_only=True)
class _Matrices(Method):
    """Adapters of single matrices, which LoRA is not: with an activation, or after the matrix."""

    name: ClassVar[str] = "UnifiedAdapter"

    phi: str
    is_sequential: bool
    s: float
    k: int
    gate: str | None
    targets: str | tuple[str, ...]
    layers: Layers = None

    def plan(self, model: nn.Module, anatomy: Anatomy, *, empty: bool = False) -> list[Graft]:
        """See `Method.plan`.

        Raises:
            SettingsError: a target is no linear.
        """
        grafts: list[Graft] = []
        for part in resolve(model, anatomy, self.targets, self.layers):
            read, out = self._widths(model, part)
            options = hosts.delta_options(model.get_submodule(part.module))
            down = torch.empty(self.k, read, **options)
            up = torch.empty(out, self.k, **options)
            if not empty:
                start_pair(down, up, "zero-up")
            place = LinearPlace(part.module, part.role, part.rows)
            grafts.append(Graft(place, MatrixChange(down, up, self)))
        if self.gate is not None:
            add_gates(self.gate, grafts, anatomy, empty)
        return grafts

    def count(self, model: nn.Module, anatomy: Anatomy) -> int:
        """See `Method.count`: k (in + out) for each matrix, or 2 k out after it; gates."""
        total = 0
        for part in resolve(model, anatomy, self.targets, self.layers):
            read, out = self._widths(model, part)
            total += self.k * (read + out) + (read + 1 if self.gate is not None else 0)
        return total

    def _widths(self, model: nn.Module, part: Projection) -> tuple[int, int]:
        """Returns the features that the change reads, and those that it adds to."""
        host = model.get_submodule(part.module)
        if part.parameter != "weight" or hosts.kind_of(host) != "linear":
            raise SettingsError(
                f"{self.name}: {part.path} is no single linear, as experts and convolutions "
                'aren\'t; leave it out with targets="attention".'
            )
        fan_in, out = hosts.features(host)
        if part.rows is not None:
            out = sum(stop - start for start, stop in part.rows)
        return (out if self.is_sequential else fan_in), out
