"""LoRA and DoRA by AdapterHub.

    LoRA   y = W x + b + s B A x                      s = alpha / r
    DoRA   y = f (W x + b + s B A x)                  f = m / ||W + B A|| by row

Ours has DoRA's norm of W + s B A and leaves b as it is, so that m is taken over as
f ||W + s B A|| and (f - 1) b as a bias of B: the same function, exactly.
A gate stands in the place of s. A file of `adapters` before 1.1 was trained with s = 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from graftune.errors import FormatError
from graftune.formats import factors
from graftune.formats.adapterhub.base import Reading
from graftune.formats.adapterhub.folder import version_of
from graftune.formats.adapterhub.low_rank import (
    Linear,
    LowRankKind,
    check_shape,
    fill_gates,
    gate_kind,
    linears,
    targets,
)
from graftune.methods.base import Method
from graftune.methods.lora import LoRA
from graftune.sites import hosts
from graftune.sites.base import Graft

_SCALED_SINCE = (1, 1)


class Lora(LowRankKind):
    """See the module."""

    name = "LoRA"

    def reads(self, settings: Mapping[str, Any]) -> bool:
        """See `Kind.reads`."""
        return (
            settings.get("architecture") == "lora"
            and settings.get("composition_mode", "add") == "add"
            and settings.get("vera_b") is None
            and settings.get("vera_d") is None
        )

    def planned(self, reading: Reading, heads: Sequence[str]) -> tuple[Method, list[Graft]]:
        """See `Kind.planned`."""
        is_dora = bool(reading.config["use_dora"])
        found = linears(reading, ("lora_A", "lora_B", *(("m.weight",) if is_dora else ())))
        scale = 1.0 if reading.config["use_gating"] else _alpha(reading) / reading.config["r"]
        for linear in found:
            _check(reading, linear)
        biased = is_dora and any(_bias(linear) is not None for linear in found)
        changes = [_change(reading, linear, scale, biased) for linear in found]
        return low_rank(reading, found, changes, heads)


def low_rank(
    reading: Reading,
    found: Sequence[Linear],
    changes: Sequence[factors.Factors],
    heads: Sequence[str],
) -> tuple[LoRA, list[Graft]]:
    """Returns changes of linears as a LoRA."""
    config = reading.config
    method = LoRA(
        r=config["r"],
        alpha=_alpha(reading),
        dropout=config["dropout"],
        targets=targets(reading, found),
        layers=reading.layers,
        dora=bool(config["use_dora"]),
        gate=gate_kind(reading),
        lora_bias=any(change.bias is not None for change in changes),
        train_head=tuple(heads) or False,
    )
    grafts = [
        factors.graft(
            linear.host,
            change,
            _slice(linear, change),
            dropout=config["dropout"],
            is_gated=method.gate is not None,
        )
        for linear, change in zip(found, changes, strict=True)
    ]
    fill_gates(reading, grafts, found)
    return method, grafts


def _alpha(reading: Reading) -> float:
    version = version_of(reading.folder.config)
    if version is not None and version < _SCALED_SINCE:
        return reading.config["r"]
    return reading.config["alpha"]


def _check(reading: Reading, linear: Linear) -> None:
    r, (fan_in, out) = reading.config["r"], linear.sizes
    shapes = {"lora_A": (r, fan_in), "lora_B": (out, r), "m.weight": (out, 1)}
    for name, shape in shapes.items():
        if name in linear.tensors:
            check_shape(reading, linear, name, shape)


def _slice(linear: Linear, change: factors.Factors) -> factors.Slice | None:
    part = linear.projection
    if part.rows is None:
        return None
    return factors.Slice(role=part.role, rows=part.rows, rank=change.rank)


def _change(reading: Reading, linear: Linear, scale: float, biased: bool) -> factors.Factors:
    A, B = linear.tensors["lora_A"], linear.tensors["lora_B"]
    bias = magnitude = None
    if "m.weight" in linear.tensors:
        magnitude, bias = _dora(linear, scale)
        bias = bias if bias is not None or not biased else B.new_zeros(B.shape[0])
        if not bool(torch.isfinite(magnitude).all()) or (
            bias is not None and not bool(torch.isfinite(bias).all())
        ):
            raise FormatError(
                f'{reading.where}: "{linear.key}m.weight" has entries of 0, which switch a feature '
                "off for good: that can't be read."
            )
    return factors.Factors(
        module=linear.module,
        parameter="weight",
        A=A,
        B=B,
        scale=scale,
        bias=bias,
        magnitude=magnitude,
    )


def _dora(linear: Linear, scale: float) -> tuple[Tensor, Tensor | None]:
    """Returns our m, `(out,)`, and the bias of B that moves b as AdapterHub does."""
    rows = linear.projection.rows
    weight = hosts.read(linear.host).detach()
    weight = weight if rows is None else weight[hosts.row_index(rows, weight.device)]
    A, B, m = (linear.tensors[name].to(weight) for name in ("lora_A", "lora_B", "m.weight"))
    change = B @ A
    f = m.flatten() / (weight + change).norm(dim=1)
    b = _bias(linear)
    moved = None if b is None else (1 - 1 / f) * b.to(f) / scale
    return f * (weight + scale * change).norm(dim=1), moved


def _bias(linear: Linear) -> Tensor | None:
    """Returns the bias of a linear's own outputs."""
    bias, rows = linear.host._parameters.get("bias"), linear.projection.rows
    if bias is None:
        return None
    return bias.detach() if rows is None else bias.detach()[hosts.row_index(rows, bias.device)]


KIND = Lora()
