"""Diff pruning: the model's tensors plus a difference that is pruned (Guo et al. 2021).

    theta' = theta + delta;   delta = z_g z * w        w, gates z, a gate z_g per tensor trained

    first part of the run       loss + lambda E[open gates]
    once, over the model        keep the largest |delta|, shut all other gates
    last part of the run        w of the open gates

w starts at 0, alpha at 5. Identity at init: yes, bit for bit, whatever z. Merge: theta + delta.
Count: while it trains, two numbers per entry and one per tensor; finished, floor(keep * entries).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from graftune.anatomy import Anatomy, resolve_tensors
from graftune.errors import SettingsError
from graftune.methods._gates import GatedChange, Gates
from graftune.methods._sparse import SparseChange, check_budget, largest, saved_sparse, tensor_place
from graftune.methods.base import Method, register
from graftune.sites.base import Delta, Graft
from graftune.sites.placing import replace_deltas


@register
@dataclass(frozen=True, kw_only=True)
class DiffPruning(Method):
    """Trains a difference of every entry and keeps a small share of them.

    Merge: the differences are added to the base's tensors.
    """

    name: ClassVar[str] = "DiffPruning"
    paper: ClassVar[str] = (
        "Guo et al. 2021, Parameter-Efficient Transfer Learning with Diff Pruning"
    )
    summary: ClassVar[str] = "A difference of every entry is trained, a small share of them kept."
    default_lr: ClassVar[float] = 5e-5
    prunes: ClassVar[bool] = True
    mixes_rows: ClassVar[bool] = False

    keep: float = 0.005
    """Share of all entries of the chosen tensors that differ from the base in the end."""
    fixed_share: float = 0.5
    """Share of the run, its last part, that trains the kept entries alone."""
    structured: bool = True
    """Give each tensor a gate of its own too, which opens or shuts all of it."""
    l0_weight: float = 1.25e-7
    """Lambda: what one open gate adds to the loss."""
    l0_form: str = "released"
    """Gates counted: "released" adds groups' to entries'; "paper", entries' times their group's."""
    alpha_init: float = 5.0
    """Where the gates' alphas start."""
    alpha_lr: float = 0.1
    """Learning rate of the alphas."""
    lower: float = -1.5
    """l, where a gate's stretched range begins: below 0."""
    upper: float = 1.5
    """r, where it ends: above 1."""
    temperature: float = 1.0
    """tau: the smaller, the nearer gates are to 0 and 1."""
    targets: str | tuple[str, ...] = "all"
    """Tensors that may differ: words, names or one regular expression; "all" is all but heads."""
    layers: int | str | tuple[int, ...] | None = None
    """Blocks to stay in; None for all, and the tensors outside blocks."""
    exclude: str | tuple[str, ...] = ()
    """Tensors to leave out again, written like `targets`."""

    def check(self) -> None:
        """See `Method.check`."""
        _ = [self._check_number(field, 0.0, 1.0) for field in ("keep", "fixed_share")]
        for field in ("l0_weight", "alpha_lr"):
            self._check_number(field, 0.0)
        self._check_number("alpha_init", -100.0, 100.0)
        self._check_choice("l0_form", ("released", "paper"))
        for field, fits, expected in (
            ("keep", self.keep > 0, "more than 0"),
            ("fixed_share", self.fixed_share < 1, "less than 1: gates need steps to train"),
            ("lower", self.lower < 0, "less than 0, so that gates can shut"),
            ("upper", self.upper > 1, "more than 1, so that gates can open"),
            ("temperature", self.temperature > 0, "more than 0"),
        ):
            if not fits:
                value = getattr(self, field)
                raise SettingsError(f"{self.name}: {field} is {value!r}, expected {expected}.")

    @property
    def gates(self) -> Gates:
        """The gates' stretch and temperature."""
        return Gates(self.lower, self.upper, self.temperature)

    def plan(self, model: nn.Module, anatomy: Anatomy, *, empty: bool = False) -> list[Graft]:
        """See `Method.plan`."""
        names = self._names(model, anatomy)
        if not empty:
            check_budget(self.name, self.keep, sum(model.get_parameter(n).numel() for n in names))
        return [self._graft(model, name, empty) for name in names]

    def plan_saved(
        self, model: nn.Module, anatomy: Anatomy, tensors: Mapping[str, Tensor]
    ) -> list[Graft]:
        """See `Method.plan_saved`: before it was finished, a file holds w and alpha instead."""
        names = self._names(model, anatomy)
        return saved_sparse(model, names, tensors) or self.plan(model, anatomy, empty=True)

    def count(self, model: nn.Module, anatomy: Anatomy) -> int:
        """See `Method.count`: w and alpha of every entry, 200 %, and the groups."""
        names = self._names(model, anatomy)
        entries = sum(model.get_parameter(name).numel() for name in names)
        return 2 * entries + (len(names) if self.structured else 0)

    def needs_steps(self, adapter: Any) -> bool:
        """See `Method.needs_steps`: until it is finished."""
        return bool(_gated(adapter))

    def check_steps(self, total: int) -> None:
        """See `Method.check_steps`."""
        first = self._gated_steps(total)
        if first < 1 or (self.fixed_share and first == total):
            raise SettingsError(
                f"DiffPruning: {total} optimizer steps can't be parted by fixed_share="
                f"{self.fixed_share:g} into some that train gates and some that train what is "
                "kept: train longer, or set fixed_share nearer to 0.5, or to 0."
            )

    def penalty(self, adapter: Any) -> Tensor | None:
        """See `Method.penalty`: lambda times the expected number of open gates."""
        deltas = _gated(adapter)
        if not deltas or not self.l0_weight or bool(deltas[0].is_fixed):
            return None
        gates = [self._open_gates(delta).to(deltas[0].w.device) for delta in deltas]
        return self.l0_weight * torch.stack(gates).sum()

    def _open_gates(self, delta: GatedChange) -> Tensor:
        entries, group = delta.expected()
        if group is None:
            return entries
        return entries + group if self.l0_form == "released" else entries * group

    def advance(self, adapter: Any, step: int, total: int) -> None:
        """See `Method.advance`: fixes the gates after the last step that trains them."""
        if step == self._gated_steps(total):
            self._fix(adapter)

    def finish(self, adapter: Any) -> None:
        """See `Method.finish`: fixes the gates if no step has, and keeps the open entries alone."""
        deltas = _gated(adapter)
        if not deltas:
            return
        if not bool(deltas[0].is_fixed):
            self._fix(adapter)
        last: dict[Delta, Delta] = {}
        for delta in deltas:
            positions = delta.kept()
            values = delta.w.detach().reshape(-1).index_select(0, positions)
            last[delta] = SparseChange.at(positions, values, delta.w.numel())
            last[delta].requires_grad_(delta.w.requires_grad)
        replace_deltas(adapter.model, adapter.grafts, last)

    def param_groups(self, adapter: Any, lr: float) -> list[dict[str, Any]] | None:
        """See `Method.param_groups`: the alphas learn faster, and don't decay."""
        deltas = _gated(adapter)
        alphas = [p for d in deltas for p in (d.alpha, d.group) if p is not None]
        return [
            {"params": [delta.w for delta in deltas], "lr": lr},
            {"params": alphas, "lr": self.alpha_lr, "weight_decay": 0.0},
        ]

    def _names(self, model: nn.Module, anatomy: Anatomy) -> tuple[str, ...]:
        return resolve_tensors(model, anatomy, self.targets, self.layers, self.exclude)

    def _graft(self, model: nn.Module, name: str, empty: bool) -> Graft:
        place, options = tensor_place(model, name)
        shape = model.get_parameter(name).shape
        w = torch.empty(shape, **options) if empty else torch.zeros(shape, **options)
        alpha = torch.empty_like(w) if empty else torch.full_like(w, self.alpha_init)
        group = torch.full((), self.alpha_init, **options) if self.structured else None
        return Graft(place, GatedChange(w, alpha, group, self.gates))

    def _gated_steps(self, total: int) -> int:
        return total - round(self.fixed_share * total)

    def _fix(self, adapter: Any) -> None:
        """Keeps the largest differences over the whole model, exactly as many as the budget."""
        deltas = _gated(adapter)
        count = check_budget(self.name, self.keep, sum(d.w.numel() for d in deltas))
        kept = largest(lambda: (delta.change().abs_() for delta in deltas), count)
        for delta, positions in zip(deltas, kept, strict=True):
            delta.fix(positions)


def _gated(adapter: Any) -> list[GatedChange]:
    """Returns the deltas that are not yet in their last form."""
    return [g.delta for g in adapter.grafts if isinstance(g.delta, GatedChange)]
