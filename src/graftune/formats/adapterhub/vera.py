"""VeRA as AdapterHub has it: whole matrices where the paper has vectors.

    y = W x + b + s V_B B V_D A x        A, B shared; V_D (r, r) and V_B (out, out) of each linear

That is more than our VeRA holds, but never more than a LoRA of rank r: it is read as one, of
A' = V_D A and B' = V_B B.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from graftune.errors import FormatError
from graftune.formats import factors
from graftune.formats.adapterhub.base import Reading
from graftune.formats.adapterhub.lora import low_rank
from graftune.formats.adapterhub.low_rank import Linear, LowRankKind, check_shape, linears
from graftune.methods.base import Method
from graftune.sites.base import Graft


class Vera(LowRankKind):
    """See the module."""

    name = "VeRA"

    def reads(self, settings: Mapping[str, Any]) -> bool:
        """See `Kind.reads`."""
        vectors = (settings.get("vera_b"), settings.get("vera_d"))
        return settings.get("architecture") == "lora" and any(v is not None for v in vectors)

    def planned(self, reading: Reading, heads: Sequence[str]) -> tuple[Method, list[Graft]]:
        """See `Kind.planned`."""
        if reading.config["use_gating"]:
            raise FormatError(f"{reading.where} is a gated VeRA (use_gating), which isn't read.")
        if sorted(reading.tensors.shared) != ["lora_A", "lora_B"]:
            raise FormatError(
                f"{reading.where} lacks the matrices that all linears share, which AdapterHub "
                "forgets to save for some models (T5): nothing can be made of the others."
            )
        found = linears(reading, ("vera_B", "vera_D"))
        changes = [_change(reading, linear) for linear in found]
        return low_rank(reading, found, changes, heads)


def _change(reading: Reading, linear: Linear) -> factors.Factors:
    r, (_, out) = reading.config["r"], linear.sizes
    check_shape(reading, linear, "vera_D", (r, r))
    check_shape(reading, linear, "vera_B", (out, out))
    A, B = reading.tensors.shared["lora_A"], reading.tensors.shared["lora_B"]
    return factors.Factors(
        module=linear.module,
        parameter="weight",
        A=linear.tensors["vera_D"] @ A,
        B=linear.tensors["vera_B"] @ B,
        scale=reading.config["alpha"] / r,
    )


KIND = Vera()
