"""What LoHa and LoKr share: LyCORIS's settings, its dropout on dW, and how factors are drawn.

LyCORIS: Yeh et al. 2023 (arXiv 2309.14859).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftune.anatomy import Anatomy
from graftune.methods._patterns import check_patterns, check_used, value_for
from graftune.methods._weight_change import Matrix, targeted
from graftune.methods.base import Method
from graftune.sites.base import Delta, Graft


@dataclass(frozen=True, kw_only=True)
class Lycoris(Method):
    """Settings of a method whose dW is alpha / r times a product of factors."""

    r: int = 8
    """Rank of each factored matrix."""
    alpha: float | None = None
    """Numerator of the scale alpha / r; None takes r, a scale of 1."""
    targets: str | tuple[str, ...] = "blocks"
    """Roles, module names or one regular expression; "blocks": all linears of attention and FFN."""
    exclude: tuple[str, ...] = ()
    """Module names left out of the targets."""
    layers: int | str | tuple[int, ...] | None = None
    """Blocks to change: an index, a list, or a slice such as "6:"; None for all."""
    rank_dropout: float = 0.0
    """Chance that a row of dW, an output feature of the change, is dropped in training."""
    module_dropout: float = 0.0
    """Chance that all of a module's change is dropped in training."""
    tucker: bool = False
    """Give convolutions a core (r, r, *kernel), so that their channels alone are factored."""
    rank_pattern: dict[str, int] | None = None
    """Other ranks, by a pattern that ends a module's name."""
    alpha_pattern: dict[str, float] | None = None
    """Other alphas, by a pattern that ends a module's name."""

    def check(self) -> None:
        """See `Method.check`."""
        self._check_number("r", 1)
        if self.alpha is not None:
            self._check_number("alpha", 0)
        self._check_number("rank_dropout", 0, 1, open_high=True)
        self._check_number("module_dropout", 0, 1, open_high=True)
        check_patterns(self.name, "rank_pattern", self.rank_pattern, 1)
        check_patterns(self.name, "alpha_pattern", self.alpha_pattern, 0)

    def rank_of(self, module: str) -> int:
        """Returns r for a module, or for an expert tensor by its own name."""
        r = value_for(self.rank_pattern, module)
        return self.r if r is None else int(r)

    def scale(self, module: str) -> float:
        """Returns alpha / r for a module."""
        r, alpha = self.rank_of(module), value_for(self.alpha_pattern, module)
        alpha = self.alpha if alpha is None else alpha
        return 1.0 if alpha is None else alpha / r

    def has_core(self, matrix: Matrix) -> bool:
        """Whether a weight's taps go into a core of their own."""
        return self.tucker and matrix.taps > 1

    def matrices(self, model: nn.Module, anatomy: Anatomy) -> list[Matrix]:
        """Returns the weights to change.

        Raises:
            SettingsError: a pattern ends none of their names.
        """
        found = targeted(model, anatomy, self.targets, self.layers, self.exclude)
        names = [matrix.name for matrix in found]
        check_used(self.name, "rank_pattern", self.rank_pattern, names)
        check_used(self.name, "alpha_pattern", self.alpha_pattern, names)
        return found

    def plan(self, model: nn.Module, anatomy: Anatomy, *, empty: bool = False) -> list[Graft]:
        """See `Method.plan`."""
        found = self.matrices(model, anatomy)
        return [Graft(matrix.place, self.change(matrix, empty)) for matrix in found]

    def count(self, model: nn.Module, anatomy: Anatomy) -> int:
        """See `Method.count`: `size` of each matrix, of which an expert has its own."""
        return sum(math.prod(m.lead) * self.size(m) for m in self.matrices(model, anatomy))

    def size(self, matrix: Matrix) -> int:
        """Returns how many parameters the change of one matrix has."""
        raise NotImplementedError

    def change(self, matrix: Matrix, empty: bool) -> Delta:
        """Returns the delta of one weight; its tensors uninitialised if `empty`."""
        raise NotImplementedError


class Dropped(Delta):
    """A change that training drops by whole output rows, and now and then altogether."""

    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    rescaled: bool = True
    """Whether the rows that are kept make up for those that aren't."""

    @property
    def drops(self) -> bool:
        """Whether anything is dropped now."""
        return self.training and (self.rank_dropout > 0 or self.module_dropout > 0)

    def kept(self, rows: Sequence[int], like: Tensor) -> Tensor:
        """Returns what each row of dW, `rows`, is multiplied by: 0, 1, or 1 / (1 - p)."""
        keep = like.new_ones(rows)
        if self.rank_dropout:
            keep = F.dropout(keep, self.rank_dropout)
            keep = keep if self.rescaled else keep * (1 - self.rank_dropout)
        if self.module_dropout:
            keep = keep * (torch.rand((), device=like.device) >= self.module_dropout)
        return keep

    def in_training(self, change: Tensor) -> Tensor:
        """Returns dW, `(..., out, in)`, with the dropout on it."""
        return change * self.kept(change.shape[:-1], change)[..., None] if self.drops else change


def uniform(tensor: Tensor, fan_in: int) -> Tensor:
    """Fills a tensor from U(-1 / sqrt(fan_in), 1 / sqrt(fan_in)): Kaiming's with a = sqrt(5)."""
    bound = 1 / math.sqrt(fan_in)
    return nn.init.uniform_(tensor, -bound, bound)
