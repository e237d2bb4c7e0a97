"""A change dW of a weight, given as a whole matrix by its factors, on every kind of host.

    x ──┬── W (frozen) ──┐
        └── dW ──────────┴─ y        dW = f(factors), (out, in, *kernel); of experts (E, out, in)

A method writes `weight_change` for factors with any number of leading dimensions, once, and makes
two classes of it: `class Here(Factors, LinearChange)`, `class InExperts(Factors, ExpertsChange)`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftune.anatomy import Anatomy, Projection, resolve
from graftune.errors import SettingsError
from graftune.sites import hosts
from graftune.sites.base import LinearDelta, LinearPlace, ParameterDelta, ParameterPlace, Place


@dataclass(frozen=True)
class Matrix:
    """A weight that a change is for, as the change sees it.

    A convolution counts as the matrix (out, in * taps); experts have `lead` (experts,).
    """

    place: Place
    name: str
    """What patterns are held against: the module, or an expert tensor's own name."""
    host: nn.Module
    lead: tuple[int, ...]
    out: int
    fan_in: int
    options: dict[str, Any]
    """Device and dtype of new trainable tensors."""
    kernel: tuple[int, ...] = ()
    """Of a convolution: its sizes."""
    index: Tensor | None = None
    """Of experts: the rows changed, where not all."""

    @property
    def taps(self) -> int:
        """Positions of a convolution's kernel; 1 elsewhere."""
        return math.prod(self.kernel)

    @property
    def in_experts(self) -> bool:
        """Whether it is a stack of experts' weights."""
        return isinstance(self.place, ParameterPlace)

    def empty(self, *shape: int) -> Tensor:
        """Returns an uninitialised tensor, with the experts' dimension before `shape`."""
        return torch.empty((*self.lead, *shape), **self.options)


def matrices(model: nn.Module, projections: tuple[Projection, ...]) -> Iterator[Matrix]:
    """Yields the weights that projections mean.

    Raises:
        SettingsError: a convolution is grouped.
    """
    for part in projections:
        host = model.get_submodule(part.module)
        if part.parameter != "weight":
            yield of_experts(host, part)
            continue
        if getattr(host, "groups", 1) != 1:
            raise SettingsError(f"{part.module} is a grouped convolution, not supported.")
        fan_in, out = hosts.features(host)
        out = out if part.rows is None else sum(stop - start for start, stop in part.rows)
        kernel = tuple(getattr(host, "kernel_size", ()))
        fan_in, options = fan_in * math.prod(kernel), hosts.delta_options(host)
        place = LinearPlace(part.module, part.role, part.rows)
        yield Matrix(place, part.module, host, (), out, fan_in, options, kernel)


def targeted(
    model: nn.Module, anatomy: Anatomy, targets: Any, layers: Any = None, exclude: Any = ()
) -> list[Matrix]:
    """Returns the weights that a method's settings mean; see `resolve`."""
    return list(matrices(model, resolve(model, anatomy, targets, layers, exclude)))


def of_experts(host: nn.Module, part: Projection) -> Matrix:
    """Returns the experts' weights that a projection means."""
    experts, out, fan_in = hosts.expert_sizes(host, part.parameter)
    options = hosts.delta_options(host, part.parameter)
    index = None
    if part.rows is not None:
        index = hosts.row_index(part.rows, options["device"])
        out = len(index)
    place = ParameterPlace(part.module, part.parameter)
    return Matrix(place, part.path, host, (experts,), out, fan_in, options, index=index)


class LinearChange(LinearDelta):
    """y + dW x on a linear, Conv1D, embedding or convolution."""

    def weight_change(self) -> Tensor:
        """Returns dW, `(out, in)`, scaled; of a convolution `(out, in * taps)`."""
        raise NotImplementedError

    def in_training(self, change: Tensor) -> Tensor:
        """Returns dW as training has it, with the method's dropout on it."""
        return change

    def forward(self, x: Tensor, y: Tensor, host: nn.Module) -> Tensor:
        """See `LinearDelta.forward`."""
        change = self.weight_change()
        if self.training:
            change = self.in_training(change)
        return y + applied(change, x, host).to(y.dtype)

    def merged(self, weight: Tensor, host: nn.Module) -> Tensor:
        """See `Delta.merged`: W + dW."""
        return weight + self.weight_change().reshape(weight.shape).to(weight.dtype)


class ExpertsChange(ParameterDelta):
    """theta_e + dW_e for each expert e of a 3-D parameter; `weight_change` gives (E, out, in)."""

    index: Tensor | None
    turned: bool

    def at(self, matrix: Matrix) -> ExpertsChange:
        """Notes which rows of the tensor it changes and how the tensor lies, and returns itself."""
        self.register_buffer("index", matrix.index, persistent=False)
        self.turned = hosts.has_turned_experts(matrix.host)
        return self

    def weight_change(self) -> Tensor:
        """Returns dW, `(experts, out, in)`, scaled."""
        raise NotImplementedError

    def in_training(self, change: Tensor) -> Tensor:
        """Returns dW as training has it, with the method's dropout on it."""
        return change

    def forward(self, value: Tensor | None, base: Tensor | None) -> Tensor:
        """See `ParameterDelta.forward`; `turned` weights are (experts, in, out)."""
        assert value is not None
        change = self.weight_change()
        if self.training:
            change = self.in_training(change)
        change, out = change.to(value.dtype), 1
        if self.turned:
            change, out = change.transpose(1, 2), 2
        return value + change if self.index is None else value.index_add(out, self.index, change)


def applied(change: Tensor, x: Tensor, host: nn.Module) -> Tensor:
    """Returns dW x for a host's input: `(..., out)`, of a convolution `(batch, out, ...)`.

    Args:
        change: dW, `(out, in)`, of a convolution `(out, in * taps)`.
        x: the host's input; ids of an embedding.
        host: the module whose weight it changes.
    """
    kind = hosts.kind_of(host)
    if kind == "embedding":
        return F.embedding(x, change.t()) * hosts.embedding_scale(host)
    x = x.to(change.dtype)
    if kind == "linear":
        return F.linear(x, change)
    assert isinstance(host, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    conv = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(host.kernel_size)]
    kernel = change.reshape(change.shape[0], -1, *host.kernel_size)
    return conv(x, kernel, None, host.stride, host.padding, host.dilation)  # type: ignore[arg-type]
