"""MAM, mix and match: a short prefix in attention, a scaled parallel bottleneck beside the FFN.

    post-norm   a = N(x + Attn(x; [P_k ; K], [P_v ; V]))     y = N(a + F(a) + s U relu(D a))
    s = 4, m = 30, the bottleneck half as wide as the model; D Kaiming uniform, U = 0

Identity at init: no, attention is shared with the prefix. Merge: no. Count: those of PrefixTuning
and ParallelAdapter. He et al. 2022, arXiv 2110.04366, section 4.6.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graftune.methods._hybrid import Hybrid
from graftune.methods.base import Method, register
from graftune.methods.parallel import ParallelAdapter
from graftune.methods.prefix import PrefixTuning


@register
@dataclass(frozen=True, kw_only=True)
class MAM(Hybrid):
    """Prefix tuning of attention and a scaled parallel adapter beside every feed-forward.

    Merge: not possible, neither part merges.
    """

    name: ClassVar[str] = "MAM"
    paper: ClassVar[str] = (
        "He et al. 2022, Towards a Unified View of Parameter-Efficient Transfer Learning"
    )
    summary: ClassVar[str] = "A short prefix in attention and a parallel bottleneck beside the FFN."
    default_lr: ClassVar[float] = 1e-3

    length: int = 30
    """m: virtual tokens before each attention's own."""
    hidden: int | None = 800
    """Width of the MLP that makes the prefix in training; None trains the prefix itself."""
    reduction: float | dict[str, float] = 2
    """d over the bottleneck's width; or by index of the block, "default" for the others."""
    bottleneck: int | None = None
    """The bottleneck's width itself (512 in the paper), in place of `reduction`."""
    scale: float | str = 4.0
    """s: a number; "learned", one number that starts at 1; or "channel", one for each feature."""
    activation: str = "relu"
    """Of the bottleneck."""
    reads: str = "input"
    """What the bottleneck reads: the feed-forward's "input", or the "residual" as AdapterHub's."""
    dropout: float = 0.0
    """Chance that an entry of the prefix, or a feature of the bottleneck's change, is dropped."""
    layers: int | str | tuple[int, ...] | None = None
    """Blocks that get both: an index, a list, or a slice such as "6:"; None for all."""

    @property
    def parts(self) -> tuple[Method, ...]:
        """See `Hybrid.parts`."""
        prefix = PrefixTuning(
            length=self.length, hidden=self.hidden, dropout=self.dropout, layers=self.layers
        )
        parallel = ParallelAdapter(
            reduction=self.reduction,
            bottleneck=self.bottleneck,
            scale=self.scale,
            activation=self.activation,
            reads=self.reads,
            dropout=self.dropout,
            layers=self.layers,
        )
        return prefix, parallel

    def check(self) -> None:
        """See `Method.check`: each part's own."""
        assert self.parts
