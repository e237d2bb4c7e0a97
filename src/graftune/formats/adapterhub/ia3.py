"""(IA)^3 by AdapterHub scales every linear's output: y = alpha l * (W x + b), or G l * (W x + b).

Of the feed-forward that is the output of its first linear, before the activation (of LLaMA's, that
of its last), where the paper and HF PEFT scale the input of the last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from graftune.formats.adapterhub.base import Reading
from graftune.formats.adapterhub.low_rank import (
    LowRankKind,
    check_shape,
    fill_gates,
    gate_kind,
    linears,
    targets,
)
from graftune.methods.base import Method
from graftune.methods.ia3 import IA3, GatedOutput, ScaledOutput
from graftune.sites import hosts
from graftune.sites.base import Graft, LinearPlace


class Ia3(LowRankKind):
    """See the module."""

    name = "IA3"
    defaults = {**LowRankKind.defaults, "alpha": 1, "r": 1}  # noqa: RUF012

    def reads(self, settings: Mapping[str, Any]) -> bool:
        """See `Kind.reads`."""
        return (
            settings.get("architecture") == "lora" and settings.get("composition_mode") == "scale"
        )

    def planned(self, reading: Reading, heads: Sequence[str]) -> tuple[Method, list[Graft]]:
        """See `Kind.planned`."""
        found = linears(reading, ("lora_B",))
        method = IA3(
            targets=targets(reading, found),
            feedforward=(),
            gate=gate_kind(reading),
            layers=reading.layers,
            train_head=tuple(heads) or False,
        )
        grafts: list[Graft] = []
        is_gated = method.gate is not None
        for linear in found:
            check_shape(reading, linear, "lora_B", (linear.sizes[1], 1))
            alpha = 1 if is_gated else reading.config["alpha"]
            scales: Tensor = linear.tensors["lora_B"].flatten() * alpha
            scales = scales.to(**hosts.delta_options(linear.host), copy=True)
            part = linear.projection
            place = LinearPlace(part.module, part.role, part.rows)
            delta = GatedOutput(scales, linear.sizes[0]) if is_gated else ScaledOutput(scales)
            grafts.append(Graft(place, delta))
        fill_gates(reading, grafts, found)
        return method, grafts


KIND = Ia3()
