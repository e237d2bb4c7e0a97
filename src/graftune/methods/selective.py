"""Selective fine-tuning: some of the model's own tensors are trained, chosen by role, name, layer.

    theta_S <- theta_S - lr * grad,   the rest of theta frozen

Attention alone (Touvron et al. 2022, arXiv 2203.09795), cross-attention alone (Gheini et al. 2021,
arXiv 2104.08771), the last blocks, feed-forwards, embeddings, the head alone (a linear probe).
Initial values: the base's own. Identity at init: yes, bit for bit. Count: the tensors' entries.
Below the lowest trained block nothing is part of the backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from graftune.anatomy import Anatomy, resolve_tensors
from graftune.anatomy.modules import is_in
from graftune.methods.base import Method, register
from graftune.sites.base import Graft
from graftune.sites.parameter import own_value


@register
@dataclass(frozen=True, kw_only=True)
class Selective(Method):
    """Trains some of the model's own tensors.

    Merge: the trained values take the place of the base's. A tied tensor is trained once, and all
    modules that share it follow.
    """

    name: ClassVar[str] = "Selective"
    paper: ClassVar[str] = (
        "Touvron et al. 2022, Three things everyone should know about Vision Transformers; "
        "Gheini et al. 2021, Cross-Attention is All You Need"
    )
    summary: ClassVar[str] = "Some of the model's own tensors are trained, chosen by role or layer."
    default_lr: ClassVar[float] = 1e-4

    targets: str | tuple[str, ...] = "attention"
    """Which: "attention", "cross-attention", "ffn", "blocks", "norms", "biases", "embeddings",
    "head", "all", a role, names of modules or tensors, or one pattern."""
    layers: int | str | tuple[int, ...] | None = None
    """Blocks to stay in, as -1, [-2, -1] or "6:"; None for all, and what is outside blocks."""
    exclude: str | tuple[str, ...] = ()
    """What to leave out again, written like `targets`; "biases" leaves the weights alone."""

    def plan(self, model: nn.Module, anatomy: Anatomy, *, empty: bool = False) -> list[Graft]:
        """See `Method.plan`."""
        return [
            own_value(model, name, empty=empty, adds=not is_in(name, anatomy.heads))
            for name in self._tensors(model, anatomy)
        ]

    def count(self, model: nn.Module, anatomy: Anatomy) -> int:
        """See `Method.count`: the entries of the tensors, those of task heads left out."""
        names = [n for n in self._tensors(model, anatomy) if not is_in(n, anatomy.heads)]
        return sum(model.get_parameter(name).numel() for name in names)

    def _tensors(self, model: nn.Module, anatomy: Anatomy) -> tuple[str, ...]:
        return resolve_tensors(model, anatomy, self.targets, self.layers, self.exclude)
