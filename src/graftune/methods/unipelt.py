"""UniPELT: a prefix, a bottleneck after the FFN and a LoRA of q and v, each behind a gate.

    K, V    [G_P P_k ; K], [G_P P_v ; V]         G = sigmoid(w x + b), by token or row: see `_gate`
    q, v    W x + G_L B A x                      the gate in the place of alpha / r
    FFN     h + G_A U phi(D z)                   z as Pfeiffer adapters read it

Initial values: gates about 1/2, B = 0, U = 0 (zero-up) or the bottleneck's own `init`. Identity at
init: no, attention is shared with the prefix. Merge: no. Count: those of the parts, and d + 1 for
each gate. Mao et al. 2022, arXiv 2110.07577, section 3.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graftune.methods._hybrid import Hybrid, check_parts
from graftune.methods.base import Method, register
from graftune.methods.lora import LoRA
from graftune.methods.pfeiffer import PfeifferAdapter
from graftune.methods.prefix import PrefixTuning

PARTS = ("prefix", "adapter", "lora")


@register
@dataclass(frozen=True, kw_only=True)
class UniPELT(Hybrid):
    """A gated prefix, a gated bottleneck and a gated LoRA; training decides what each input needs.

    Merge: not possible, gates depend on the input.
    """

    name: ClassVar[str] = "UniPELT"
    paper: ClassVar[str] = (
        "Mao et al. 2022, UniPELT: A Unified Framework for Parameter-Efficient Language Model "
        "Tuning"
    )
    summary: ClassVar[str] = "A gated prefix, a gated bottleneck and a gated LoRA together."
    default_lr: ClassVar[float] = 5e-4

    submodules: tuple[str, ...] = PARTS
    """Which of "prefix", "adapter" and "lora" it has; the paper's AP is ("prefix", "adapter")."""
    length: int = 10
    """m: virtual tokens before each attention's own."""
    hidden: int | None = 512
    """Width of the MLP that makes the prefix in training; None trains the prefix itself."""
    reduction: float | dict[str, float] = 16
    """d over the bottleneck's width; or by index of the block, "default" for the others."""
    bottleneck: int | None = None
    """The bottleneck's width itself, in place of `reduction`."""
    activation: str = "relu"
    """Of the bottleneck."""
    placement: str = "adapterhub"
    """Where the bottleneck reads and adds; see PfeifferAdapter."""
    init: str = "bert"
    """Of the bottleneck: "bert" N(0, 0.02^2), "near-identity", or "zero-up"."""
    r: int = 8
    """Rank of the LoRA."""
    alpha: float | None = None
    """LoRA's alpha; counts only with `gate_times_scale`."""
    targets: str | tuple[str, ...] = ("query", "value")
    """What the LoRA changes."""
    gate: str | None = "auto"
    """Of all three: "auto", "token", "mean", "mean-padded" (the paper's code), or None for none."""
    gate_times_scale: bool = False
    """Let LoRA's gates multiply alpha / r, not stand in its place."""
    layers: int | str | tuple[int, ...] | None = None
    """Blocks that get all three: an index, a list, or a slice such as "6:"; None for all."""

    @property
    def parts(self) -> tuple[Method, ...]:
        """See `Hybrid.parts`."""
        gate, layers = self.gate, self.layers
        every: dict[str, Method] = {
            "prefix": PrefixTuning(
                length=self.length, hidden=self.hidden, gate=gate, layers=layers
            ),
            "adapter": PfeifferAdapter(
                reduction=self.reduction,
                bottleneck=self.bottleneck,
                activation=self.activation,
                placement=self.placement,
                init=self.init,
                gate=gate,
                layers=layers,
            ),
            "lora": LoRA(
                r=self.r,
                alpha=self.alpha,
                targets=self.targets,
                gate=gate,
                gate_times_scale=self.gate_times_scale,
                layers=layers,
            ),
        }
        return tuple(every[name] for name in PARTS if name in self.submodules)

    def check(self) -> None:
        """See `Method.check`: each part's own too."""
        self._check_choice("submodules", PARTS)
        check_parts(self.name, self.parts)
