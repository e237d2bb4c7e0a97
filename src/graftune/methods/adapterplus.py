"""Adapter+: one bottleneck a block, on the block's own output (Steitz and Roth 2024).

    pre-norm    y = a + h + s * A(a + h)              h = FFN(N a)
    post-norm   y = z + s * A(z)                      z = N(a + h)
    A(z) = U phi(D z + c_D) + c_U,  k = d / 96        s (d), one for each feature, from 1

D, U ~ N(0, 0.01^2) cut at two deviations, biases 0 (`init="zero-up"` starts at the base). In
training a row's whole change is dropped one time in ten. Merge: no.
Count: 2 d k + 2 d + k a block. arXiv 2406.06820, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graftune.methods._bottleneck import SerialMethod
from graftune.methods.base import register


@register
@dataclass(frozen=True, kw_only=True)
class AdapterPlus(SerialMethod):
    """One very small bottleneck a block with a scale for each feature, made for vision models.

    Merge: not possible, the bottleneck isn't linear.
    """

    name: ClassVar[str] = "AdapterPlus"
    paper: ClassVar[str] = "Steitz and Roth 2024, Adapters Strike Back"
    summary: ClassVar[str] = "One tiny bottleneck a block with a scale per feature, for vision."
    default_lr: ClassVar[float] = 1e-3

    placement: str = "result"
    """What is read and where it is added: "result" as published, "simple", or "adapterhub"."""
    reduction: float | dict[str, float] = 96
    """d over k; or by index of the block, "default" for the others."""
    activation: str = "gelu"
    """phi: relu, gelu, gelu_tanh, silu, tanh, sigmoid, leaky_relu, elu or identity."""
    scale: float | str = "channel"
    """s: a number; "learned", one number that starts at 1; or "channel", one for each feature."""
    stochastic_depth: float = 0.1
    """Chance that a row's whole change is dropped in training."""
    init: str = "near-identity"
    """Of D and U: "near-identity" N(0, 0.01^2), "bert" N(0, 0.02^2), "zero-up" equals the base."""
