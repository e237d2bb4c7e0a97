"""(IA)³: keys, values and inner activations, each scaled by a learned vector (Liu et al. 2022).

    softmax( q (l_k * k)ᵀ / √d_head ) (l_v * v)        (l_ff * act(W1 x)) W2

    x ── W_k ──*── k      x ── W_v ──*── v      x ── W1 ── act ──*── W2 ── y
              l_k                   l_v                         l_ff, the input of "down"

arXiv 2205.05638, section 3.3; * is by feature, the same for every token. Initial values: ones.
Identity at init: yes, bit for bit (x * 1). Merge: rows of W_k, W_v and their biases, columns of W2.
Count: d_k + d_v + d_ff per block, and d_k + d_v per cross-attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from graftune.anatomy import Anatomy
from graftune.errors import AdapterError, SettingsError
from graftune.methods._gate import GATES, Gate, add_gates
from graftune.methods._weight_change import Matrix, targeted
from graftune.methods.base import Method, register
from graftune.sites import hosts
from graftune.sites.base import Graft, InputDelta, LinearDelta, LinearPlace, ParameterDelta

Names = str | tuple[str, ...]


@register
@dataclass(frozen=True, kw_only=True)
class IA3(Method):
    """A vector of scales on each chosen linear's output or input."""

    name: ClassVar[str] = "IA3"
    paper: ClassVar[str] = (
        "Liu et al. 2022, Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than "
        "In-Context Learning"
    )
    summary: ClassVar[str] = "Vectors that scale keys, values and FFN activations; merges."
    default_lr: ClassVar[float] = 3e-3

    targets: Names = ("key", "value")
    """Linears whose outputs are scaled: roles, module names or one regular expression; () for none.
    """
    feedforward: Names = ("down",)
    """Linears whose inputs are scaled: in "down", the FFN's inner activation; () for none."""
    exclude: tuple[str, ...] = ()
    """Module names left out of both."""
    gate: str | None = None
    """Multiply the scales of outputs by a gate: "token", "mean", "mean-padded" or "auto"; see
    `_gate`. Then it starts at about half of the base's outputs, and can't be merged."""
    layers: int | str | tuple[int, ...] | None = None
    """Blocks to change: an index, a list, or a slice such as "6:"; None for all."""

    def check(self) -> None:
        """See `Method.check`."""
        if not self.targets and not self.feedforward:
            raise SettingsError("IA3: targets and feedforward are both empty: nothing is scaled.")
        if self.gate is not None:
            self._check_choice("gate", GATES)
            if self.feedforward:
                raise SettingsError(
                    f'IA3: gate="{self.gate}" is of scaled outputs: name "up" in targets, and set '
                    "feedforward=()."
                )

    def plan(self, model: nn.Module, anatomy: Anatomy, *, empty: bool = False) -> list[Graft]:
        """See `Method.plan`.

        Raises:
            SettingsError: a place has no features to scale on that side.
        """
        outputs, inputs = self._matrices(model, anatomy)
        scaled = [_scaled_output(m, self.gate is not None) for m in outputs]
        if self.gate is not None:
            add_gates(self.gate, scaled, anatomy, empty)
        return scaled + [_scaled_input(m) for m in inputs]

    def count(self, model: nn.Module, anatomy: Anatomy) -> int:
        """See `Method.count`: a scale for each feature, of which an expert has its own."""
        outputs, inputs = self._matrices(model, anatomy)
        gates = 0 if self.gate is None else sum(matrix.fan_in + 1 for matrix in outputs)
        scaled = sum(matrix.out for matrix in outputs) + gates
        return scaled + sum(_entries(matrix) for matrix in inputs)

    def _matrices(self, model: nn.Module, anatomy: Anatomy) -> tuple[list[Matrix], list[Matrix]]:
        outputs, inputs = (
            targeted(model, anatomy, names, self.layers, self.exclude) if names else []
            for names in (self.targets, self.feedforward)
        )
        return outputs, inputs


class ScaledOutput(LinearDelta):
    """l * y. Shapes: l (out)."""

    l: nn.Parameter  # noqa: E741 - the paper's letter

    def __init__(self, scales: Tensor) -> None:
        super().__init__()
        self.l = nn.Parameter(scales)

    def forward(self, x: Tensor, y: Tensor, host: nn.Module) -> Tensor:
        """See `LinearDelta.forward`."""
        return (y * _by_feature(self.l, host)).to(y.dtype)

    def merged(self, weight: Tensor, host: nn.Module) -> Tensor:
        """See `Delta.merged`: rows of W."""
        return weight * self.l.reshape(-1, *[1] * (weight.ndim - 1))

    def bias_change(self, bias: Tensor | None) -> Tensor | None:
        """See `LinearDelta.bias_change`: l * b in all."""
        return None if bias is None else (self.l - 1) * bias


class GatedOutput(ScaledOutput):
    """G * l * y, G by row or token of x. Shapes: gate, see `Gate`."""

    gate: Gate

    def __init__(self, scales: Tensor, gate_width: int) -> None:
        super().__init__(scales)
        self.gate_width = gate_width

    def forward(self, x: Tensor, y: Tensor, host: nn.Module) -> Tensor:
        """See `LinearDelta.forward`."""
        return (y * (self.l * self.gate(x))).to(y.dtype)

    def merged(self, weight: Tensor, host: nn.Module) -> Tensor:
        """See `Delta.merged`."""
        raise AdapterError("A gated IA3 can't be merged: its gates depend on the input.")


class ScaledInput(InputDelta):
    """W (l * x). Shapes: l (in)."""

    l: nn.Parameter  # noqa: E741

    def __init__(self, scales: Tensor) -> None:
        super().__init__()
        self.l = nn.Parameter(scales)

    def forward(self, x: Tensor, host: nn.Module) -> Tensor:
        """See `InputDelta.forward`."""
        return (x * _by_feature(self.l, host)).to(x.dtype)

    def merged(self, weight: Tensor, host: nn.Module) -> Tensor:
        """See `Delta.merged`: columns of W."""
        return weight * self.l.reshape(-1, *[1] * (weight.ndim - 2))


class ScaledExperts(ParameterDelta):
    """W_e (l_e * x) for each expert e of a 3-D parameter, by the columns of W_e.

    Shapes: l (experts, in); `turned` weights are (experts, in, out).
    """

    l: nn.Parameter  # noqa: E741

    def __init__(self, scales: Tensor, turned: bool) -> None:
        super().__init__()
        self.l = nn.Parameter(scales)
        self.turned = turned

    def forward(self, value: Tensor | None, base: Tensor | None) -> Tensor:
        """See `ParameterDelta.forward`."""
        assert value is not None
        return (value * self.l.unsqueeze(2 if self.turned else 1)).to(value.dtype)


def _by_feature(scales: Tensor, host: nn.Module) -> Tensor:
    """Returns scales shaped to features: the last dimension, of a convolution the channels."""
    taps = getattr(host, "kernel_size", ())
    return scales.reshape(-1, *[1] * len(taps)) if taps else scales


def _entries(matrix: Matrix) -> int:
    """Returns how many input features a weight, or a stack of experts, has."""
    return matrix.lead[0] * matrix.fan_in if matrix.lead else matrix.fan_in // matrix.taps


def _scaled_output(matrix: Matrix, is_gated: bool) -> Graft:
    if matrix.in_experts:
        raise SettingsError(
            f"IA3: {matrix.name} holds the weights of experts, whose outputs can't be scaled; "
            "name it in feedforward to scale what enters them."
        )
    ones = matrix.empty(matrix.out).fill_(1)
    if not is_gated:
        return Graft(matrix.place, ScaledOutput(ones))
    if hosts.kind_of(matrix.host) != "linear":
        raise SettingsError(f"IA3: {matrix.name} is no linear, and can't be gated.")
    return Graft(matrix.place, GatedOutput(ones, matrix.fan_in))


def _scaled_input(matrix: Matrix) -> Graft:
    place = matrix.place
    if matrix.in_experts:
        turned = hosts.has_turned_experts(matrix.host)
        return Graft(place, ScaledExperts(matrix.empty(matrix.fan_in).fill_(1), turned))
    assert isinstance(place, LinearPlace)
    if hosts.kind_of(matrix.host) == "embedding":
        raise SettingsError(
            f"IA3: {matrix.name} is an embedding: its input is ids, not features; name it in "
            "targets to scale its output."
        )
    if place.rows is not None:
        raise SettingsError(
            f"IA3: {matrix.name} is several linears in one, which share an input: scale it for all "
            f'of them, as by feedforward="{matrix.name.rpartition(".")[2]}".'
        )
    ones = torch.ones(_entries(matrix), **matrix.options)
    return Graft(LinearPlace(place.module, place.role, side="input"), ScaledInput(ones))
