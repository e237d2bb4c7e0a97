"""LayerNorm tuning: only the norms are trained (Zhao et al. 2023, arXiv 2312.11420).

    y = gamma * (x - mean) / std + beta,   gamma and beta trained;   RMS norms have no beta

Initial values: the base's own. Identity at init: yes, bit for bit. Count: the entries of gamma and
beta, width per norm each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from graftune.anatomy import Anatomy, resolve_tensors
from graftune.anatomy.tensors import WORDS
from graftune.errors import SettingsError
from graftune.methods.base import Method, register
from graftune.sites.base import Graft
from graftune.sites.parameter import own_value

WHICH = ("all", "weight", "bias")


@register
@dataclass(frozen=True, kw_only=True)
class LayerNormTuning(Method):
    """Trains the weights and biases of the model's norms.

    Merge: the trained values take the place of the base's.
    """

    name: ClassVar[str] = "LayerNormTuning"
    paper: ClassVar[str] = (
        "Zhao et al. 2023, Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM "
        "Finetuning"
    )
    summary: ClassVar[str] = "Only the norms' weights and biases are trained."
    default_lr: ClassVar[float] = 1e-3

    which: str = "all"
    """Of each norm: "all", its "weight" (gamma) or its "bias" (beta)."""
    targets: str | tuple[str, ...] = "norms"
    """Which: "norms", all of them outside task heads; or names of modules, or one pattern."""
    layers: int | str | tuple[int, ...] | None = None
    """Blocks whose norms are trained; None for all, and those outside blocks."""

    def check(self) -> None:
        """See `Method.check`."""
        self._check_choice("which", WHICH)
        words = (self.targets,) if isinstance(self.targets, str) else self.targets
        for word in {*words} & ({*WORDS} - {"norms"}):
            raise SettingsError(
                f'LayerNormTuning: targets names "{word}", expected "norms" or names of modules: '
                f'take Selective(targets="{word}") to train that.'
            )

    def plan(self, model: nn.Module, anatomy: Anatomy, *, empty: bool = False) -> list[Graft]:
        """See `Method.plan`.

        Raises:
            SettingsError: if no norm has what `which` asks for, as RMS norms have no bias.
        """
        return [own_value(model, name, empty=empty) for name in self._tensors(model, anatomy)]

    def count(self, model: nn.Module, anatomy: Anatomy) -> int:
        """See `Method.count`: the widths of the norms, for weights and for biases."""
        return sum(model.get_parameter(n).numel() for n in self._tensors(model, anatomy))

    def _tensors(self, model: nn.Module, anatomy: Anatomy) -> list[str]:
        names = resolve_tensors(model, anatomy, self.targets, self.layers)
        found = [n for n in names if self.which in ("all", n.rpartition(".")[2])]
        if not found:
            raise SettingsError(
                f'LayerNormTuning: which is "{self.which}", but none of the {len(names)} tensors '
                f'of {self.targets!r} is a {self.which}, as in {names[0]}: take which="all".'
            )
        return found
