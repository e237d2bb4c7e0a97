"""Houlsby adapters: a bottleneck after attention and after FFN (Houlsby et al. 2019).

    post-norm   a = N1(x + A1(SA(x)));      y = N2(a + A2(FFN(a)))
    pre-norm    a = x + A1(SA(N1 x));       y = a + A2(FFN(N2 a))
    A(h) = h + U phi(D h + c_D) + c_U

D, U ~ N(0, 0.01^2) cut at two deviations, biases 0: near the identity, not equal to it
(`init="zero-up"` is). The model's norms are trained too. Merge: no, phi isn't linear.
Count: 2 d k + d + k for each of two places a block, and the norms. arXiv 1902.00751, section 2.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graftune.methods._bottleneck import SerialMethod
from graftune.methods.base import register


@register
@dataclass(frozen=True, kw_only=True)
class HoulsbyAdapter(SerialMethod):
    """Bottlenecks after attention and after the feed-forward of every block.

    Merge: not possible, the bottleneck isn't linear.
    """

    name: ClassVar[str] = "HoulsbyAdapter"
    paper: ClassVar[str] = "Houlsby et al. 2019, Parameter-Efficient Transfer Learning for NLP"
    summary: ClassVar[str] = "Two small bottlenecks a block, after attention and after FFN."
    default_lr: ClassVar[float] = 1e-3

    sublayers: tuple[str, ...] = ("attention", "ffn")
    """Which get one: "attention", "cross-attention", "ffn"."""
    bottleneck: int | None = 64
    """k; None for d over `reduction`."""
    activation: str = "gelu"
    """phi: relu, gelu, gelu_tanh, silu, tanh, sigmoid, leaky_relu, elu or identity."""
    init: str = "near-identity"
    """Of D and U: "near-identity" N(0, 0.01^2), "bert" N(0, 0.02^2), "zero-up" equals the base."""
    train_norms: bool = True
    """Train the model's own norms with it, as the paper does; AdapterHub doesn't."""
