"""AdaLoRA: dW = s * P Lambda Q, a budget of ranks shared out by importance (Zhang et al. 2023).

    x ──┬── W (frozen) ───────────────────────┐     Q (r, in), P (out, r): normal, deviation 0.02
        └─ dropout ─ Q ─ Lambda ─ P ─ *s ─────┴─ y  Lambda (r,), the diagonal: zeros

Each matrix starts with r triplets (P's column, lambda, Q's row); those of least importance over
all matrices are pruned, until `target_r` are left on average. Pruning sets lambda to 0 alone, so a
triplet may come back while the budget still falls. Letters as in arXiv 2303.10512; the authors'
code and HF PEFT call P lora_B, Lambda lora_E, Q lora_A.
Identity at init: yes, bit for bit. Merge: W + s P Lambda Q. Count: r * (in + out + 1) per matrix.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from graftune.anatomy import Anatomy
from graftune.errors import SettingsError, nearest
from graftune.methods._triplets import Triplets, TripletsBeside, TripletsInExperts, allocate
from graftune.methods._weight_change import Matrix, targeted
from graftune.methods.base import HeatMap, Method, register
from graftune.sites.base import Graft


@dataclass(frozen=True)
class Schedule:
    """When ranks are pruned, in optimizer steps: 1 ... tinit ... last ... total.

    Up to `tinit` every triplet trains; then the budget falls; from `last` on the ranks are fixed.
    """

    total: int
    tinit: int
    tfinal: int
    delta_t: int

    @property
    def last(self) -> int:
        """The step at which ranks are shared out for the last time."""
        return self.total - self.tfinal

    def budget(self, step: int, before: int, after: int) -> int:
        """Returns how many triplets of `before` may stay after a step: a cubic down to `after`."""
        if step <= self.tinit:
            return before
        left = 1 - min(1.0, (step - self.tinit) / (self.last - self.tinit))
        return int(after + (before - after) * left**3)

    def allocates(self, step: int) -> bool:
        """Whether the budget is shared out anew after a step."""
        return step == self.last or (self.tinit < step < self.last and step % self.delta_t == 0)


@register
@dataclass(frozen=True, kw_only=True)
class AdaLoRA(Method):
    """Low-rank changes whose ranks end where they matter.

    On 3-D expert tensors the change is of the weight itself, so `dropout` is refused there; each
    expert's matrix has its own share of the budget.
    """

    name: ClassVar[str] = "AdaLoRA"
    paper: ClassVar[str] = "Zhang et al. 2023, Adaptive Budget Allocation for PEFT"
    summary: ClassVar[str] = "LoRA as a singular value decomposition; prunes ranks by importance."
    default_lr: ClassVar[float] = 2e-3
    prunes: ClassVar[bool] = True

    r: int = 12
    """Rank of every matrix at the start."""
    target_r: int = 8
    """Mean rank over the matrices at the end: the budget is this times their number."""
    alpha: float | None = None
    """Numerator of the scale; None takes r, a scale of 1."""
    dropout: float = 0.0
    """Chance that an input feature of the change is dropped in training."""
    targets: str | tuple[str, ...] = "blocks"
    """Roles, module names or one regular expression; "blocks": all linears of attention and FFN."""
    exclude: tuple[str, ...] = ()
    """Module names left out of the targets."""
    layers: int | str | tuple[int, ...] | None = None
    """Blocks to change: an index, a list, or a slice such as "6:"; None for all."""
    tinit: int | None = None
    """Optimizer steps before the first pruning; None, a tenth of the run."""
    tfinal: int | None = None
    """Optimizer steps after the last pruning, at fixed ranks; None, half of those after tinit."""
    delta_t: int | None = None
    """Optimizer steps between two prunings; None, so that there are about a hundred."""
    beta1: float = 0.85
    """How much of a weight's smoothed importance stays at each step."""
    beta2: float = 0.85
    """How much of the smoothed deviation from it stays at each step."""
    orthogonal: float = 0.1
    """Weight of the penalty that keeps P's columns and Q's rows orthonormal."""
    orthogonal_form: Literal["released", "paper"] = "released"
    """The penalty: the mean Frobenius norm over all P and Q, or the sum of its squares."""
    scale_form: Literal["released", "paper"] = "released"
    """The scale s: alpha / (r + 1e-5) with the starting r, or 1."""
    rank_pattern: dict[str, int] | None = None
    """Ranks left after training, by place; set once pruning is done, so that none follows."""

    def check(self) -> None:
        """See `Method.check`."""
        self._check_number("r", 1)
        self._check_number("target_r", 1)
        self._check_number("dropout", 0, 1, open_high=True)
        self._check_number("beta1", 0, 1, open_high=True)
        self._check_number("beta2", 0, 1, open_high=True)
        self._check_number("orthogonal", 0)
        for field, low in (("alpha", 0), ("tinit", 0), ("tfinal", 0), ("delta_t", 1)):
            if getattr(self, field) is not None:
                self._check_number(field, low)
        self._check_choice("orthogonal_form", ("released", "paper"))
        self._check_choice("scale_form", ("released", "paper"))
        if self.target_r > self.r:
            raise SettingsError(
                f"AdaLoRA: target_r is {self.target_r}, expected at most r, which is {self.r}: "
                "ranks are pruned, never added."
            )
        if self.alpha is not None and self.scale_form == "paper":
            raise SettingsError('AdaLoRA: scale_form "paper" is a scale of 1: leave alpha out.')
        for name, rank in (self.rank_pattern or {}).items():
            if not 0 <= rank <= self.r:
                raise SettingsError(
                    f'AdaLoRA: rank_pattern["{name}"] is {rank}, expected between 0 and r, '
                    f"which is {self.r}."
                )

    @property
    def scale(self) -> float:
        """Returns s, which stays as it is when ranks are pruned."""
        if self.scale_form == "paper":
            return 1.0
        return (self.r if self.alpha is None else self.alpha) / (self.r + 1e-5)

    def plan(self, model: nn.Module, anatomy: Anatomy, *, empty: bool = False) -> list[Graft]:
        """See `Method.plan`."""
        return [
            Graft(matrix.place, self._delta(matrix, rank, empty))
            for matrix, rank in self._ranked(model, anatomy)
        ]

    def count(self, model: nn.Module, anatomy: Anatomy) -> int:
        """See `Method.count`: r * (in + out + 1) per matrix, of which an expert has its own."""
        return sum(
            rank * (matrix.fan_in + matrix.out + 1) * (matrix.lead or (1,))[0]
            for matrix, rank in self._ranked(model, anatomy)
        )

    def _ranked(self, model: nn.Module, anatomy: Anatomy) -> list[tuple[Matrix, int]]:
        """Returns the targets with their ranks."""
        found = targeted(model, anatomy, self.targets, self.layers, self.exclude)
        pattern = self.rank_pattern or {}
        known = [matrix.place.key for matrix in found]
        for name in pattern:
            if name not in known:
                raise SettingsError(
                    f'AdaLoRA: rank_pattern names "{name}", which is none of the {len(known)} '
                    f"targets.{nearest(name, known)}"
                )
        return [(matrix, pattern.get(matrix.place.key, self.r)) for matrix in found]

    def _delta(self, matrix: Matrix, rank: int, empty: bool) -> Triplets:
        if not empty and rank > min(matrix.out, matrix.fan_in):
            raise SettingsError(
                f"AdaLoRA: r is {rank}, but {matrix.name} is {matrix.out}x{matrix.fan_in}: no "
                "change of it has a higher rank than its smaller side; set a smaller r."
            )
        if matrix.in_experts and self.dropout:
            raise SettingsError(
                f"AdaLoRA: {matrix.name} holds the weights of experts, on which dropout is not "
                'possible; leave it out with targets="attention".'
            )
        P, Lambda = matrix.empty(matrix.out, rank), matrix.empty(rank)
        Q = matrix.empty(rank, matrix.fan_in)
        if not empty:
            nn.init.normal_(P, std=0.02)
            nn.init.normal_(Q, std=0.02)
            nn.init.zeros_(Lambda)
        prunes = self.rank_pattern is None
        if matrix.in_experts:
            delta = TripletsInExperts(P, Lambda, Q, self.scale, prunes)
            delta.at(matrix)
            return delta
        return TripletsBeside(P, Lambda, Q, self.scale, prunes, self.dropout)

    def schedule(self, total: int) -> Schedule:
        """Returns the schedule of a run of so many optimizer steps.

        Raises:
            SettingsError: no step is left to prune in.
        """
        tinit, tfinal = self.tinit, self.tfinal
        if tinit is None:
            tinit = max(0, total - (tfinal or 0)) // 10
        if tfinal is None:
            tfinal = max(0, total - tinit) // 2
        falls = total - tfinal - tinit
        if falls < 1:
            raise SettingsError(
                f"AdaLoRA: tinit ({tinit}) and tfinal ({tfinal}) leave none of the run's {total} "
                "optimizer steps to prune in: set smaller ones, or train for more steps."
            )
        return Schedule(total, tinit, tfinal, self.delta_t or max(1, falls // 100))

    def check_steps(self, total: int) -> None:
        """See `Method.check_steps`: there must be a step between tinit and tfinal."""
        if self.rank_pattern is None:
            self.schedule(total)

    def needs_steps(self, adapter: Any) -> bool:
        """See `Method.needs_steps`: until the ranks are final."""
        return self.rank_pattern is None

    def penalty(self, adapter: Any) -> Tensor | None:
        """See `Method.penalty`: how far all P' P and Q Q' are from I, (r, r) each."""
        if self.rank_pattern is not None or not self.orthogonal:
            return None
        grams = [gram for triplets in triplets_of(adapter) for gram in triplets.grams()]
        every = torch.cat([gram.to(grams[0].device) for gram in grams])
        away = (every - torch.eye(self.r).to(every)).flatten(1)  # (matrices, r * r)
        if self.orthogonal_form == "paper":
            return self.orthogonal * away.square().sum()
        return self.orthogonal * away.norm(dim=1).mean()

    def advance(self, adapter: Any, step: int, total: int) -> None:
        """See `Method.advance`: measures importance, and prunes to the budget of the step."""
        if self.rank_pattern is not None:
            return
        schedule, found = self.schedule(total), triplets_of(adapter)
        if step <= schedule.last:
            for triplets in found:
                triplets.measure(self.beta1, self.beta2)
        if schedule.allocates(step):
            allocate(found, schedule.budget(step, *self._budgets(found)))
        elif step > schedule.last:
            for triplets in found:
                triplets.prune()

    def finish(self, adapter: Any) -> None:
        """See `Method.finish`: prunes to the budget, drops what was pruned, notes the ranks left.

        A run cut short, or one whose best weights were put back, is pruned by the importance that
        it had then.
        """
        if self.rank_pattern is not None:
            return
        found = triplets_of(adapter)
        _, budget = self._budgets(found)
        if sum(int(triplets.is_kept.sum()) for triplets in found) != budget:
            allocate(found, budget)
        for triplets in found:
            triplets.shrink()
        ranks = {
            graft.place.key: graft.delta.rank
            for graft in adapter.grafts
            if isinstance(graft.delta, Triplets)
        }
        adapter.method = dataclasses.replace(self, rank_pattern=ranks)

    def _budgets(self, found: Sequence[Triplets]) -> tuple[int, int]:
        """Returns the triplets at the start and those at the end."""
        matrices = sum(triplets.Lambda.numel() for triplets in found) // self.r
        return self.r * matrices, self.target_r * matrices

    def heat_maps(self, adapter: Any) -> list[HeatMap]:
        """See `Method.heat_maps`: each matrix's rank, by block; the mean of experts'."""
        ranks = {
            graft.place.key: graft.delta.mean_rank()
            for graft in adapter.grafts
            if isinstance(graft.delta, Triplets)
        }
        note = f"Each began with {self.r}; the budget is {self.target_r} on average."
        return [HeatMap.by_block("Rank of each matrix", ranks, adapter.anatomy, note)]


def triplets_of(adapter: Any) -> list[Triplets]:
    """Returns an adapter's deltas but those of its head."""
    return [graft.delta for graft in adapter.grafts if isinstance(graft.delta, Triplets)]
