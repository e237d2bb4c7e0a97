"""Pfeiffer adapters: one bottleneck a block, after FFN (Pfeiffer et al. 2021, AdapterFusion).

    placement="adapterhub"   post-norm   y = N(a + h + A(N(a + h)))     h = FFN(a)
                             pre-norm    y = a + h + A(a + h)           h = FFN(N a)
    placement="simple"       y = N(a + h + A(h)), or a + h + A(h)
    A(z) = U phi(D z + c_D) + c_U,  k = d / 16

D, U ~ N(0, 0.02^2), biases 0 (`init="zero-up"` starts at the base). Norms stay frozen. Merge: no.
Count: 2 d k + d + k a block. arXiv 2005.00247, appendix A; formulas as in the AdapterHub library.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graftune.methods._bottleneck import SerialMethod
from graftune.methods.base import register


@register
@dataclass(frozen=True, kw_only=True)
class PfeifferAdapter(SerialMethod):
    """One bottleneck after the feed-forward of every block.

    Merge: not possible, the bottleneck isn't linear.
    """

    name: ClassVar[str] = "PfeifferAdapter"
    paper: ClassVar[str] = (
        "Pfeiffer et al. 2021, AdapterFusion: Non-Destructive Task Composition for Transfer "
        "Learning"
    )
    summary: ClassVar[str] = "One small bottleneck a block, after FFN."
    default_lr: ClassVar[float] = 1e-3

    placement: str = "adapterhub"
    """What is read and where it is added: "adapterhub" as published, "simple", or "result"."""
    init: str = "bert"
    """Of D and U: "bert" N(0, 0.02^2), "near-identity" N(0, 0.01^2), "zero-up" equals the base."""
