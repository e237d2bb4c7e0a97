"""Parallel adapters: a bottleneck beside a sublayer (He et al. 2022, a unified view).

    post-norm   y = N(x + F(x) + A(x))            pre-norm   y = x + F(N x) + A(N x)
    A(z) = s (U phi(D z + c_D) + c_U)             s = 4, or learned from 1

D Kaiming uniform, U and biases 0. Identity at init: yes, bit for bit. Merge: no.
`reads="residual"` takes x itself in pre-norm blocks, as AdapterHub does; the paper what F sees.
Count: 2 d k + d + k a place. arXiv 2110.04366, section 3.3 and table 6.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graftune.methods._bottleneck import BottleneckMethod
from graftune.methods.base import register


@register
@dataclass(frozen=True, kw_only=True)
class ParallelAdapter(BottleneckMethod):
    """A bottleneck that reads what a sublayer reads, and adds to its answer.

    Merge: not possible, the bottleneck isn't linear.
    """

    name: ClassVar[str] = "ParallelAdapter"
    paper: ClassVar[str] = (
        "He et al. 2022, Towards a Unified View of Parameter-Efficient Transfer Learning"
    )
    summary: ClassVar[str] = "A bottleneck beside FFN or attention, added to its answer."
    default_lr: ClassVar[float] = 1e-3
    hint: ClassVar[str] = 'take reads="input"'

    reads: str = "input"
    """What it reads: the sublayer's "input", behind the norm if pre-norm, or the "residual"."""
    reduction: float | dict[str, float] = 2
    """d over k; or by index of the block, "default" for the others."""
    scale: float | str = 4.0
    """s: a number; "learned", one number that starts at 1; or "channel", one for each feature."""

    @property
    def source(self) -> str:
        """See `BottleneckMethod.source`."""
        return self.reads

    def check(self) -> None:
        """See `Method.check`."""
        super().check()
        self._check_choice("reads", ("input", "residual"))
