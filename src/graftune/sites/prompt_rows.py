"""Which virtual tokens each row of a batch gets from the adapters that act on it.

one composition     [P_a ; P_b] for every row
rows of their own   each group's, those shorter than the longest filled up at the front
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from graftune.composition import Mean, Steps, names_in
from graftune.errors import AdapterError
from graftune.sites.base import EmbeddingDelta, Site
from graftune.sites.kept import Kept, thread_id
from graftune.sites.plan import RowsAt, joined, taken
from graftune.sites.state import Active
from graftune.sites.tasks import checked_tasks, tasks_of_rows
from graftune.sites.woven import Woven


class PromptSite(Site):
    """What sites of virtual tokens have in common: whose tokens they are.

    Args:
        active: the model's shared state.
    """

    def __init__(self, active: Active) -> None:
        super().__init__(active)
        self.kept = Kept()

    def _acts_now(self) -> bool:
        plan = self.active.current()
        return any(self.holds(steps) for steps, _ in plan.groups or ((plan.steps, ()),))

    def _lengthens_now(self) -> bool:
        names = self.active.current().names
        return any(getattr(self._modules.get(name), "marker", 0) is None for name in names)

    def _woven(self, rows: int, device: torch.device, marker: int | None = None) -> Woven | None:
        """Returns the active prompts of a batch, None for none.

        Args:
            rows: of the batch.
            device: of the batch.
            marker: which prompts: in the places of this token; None are those that lengthen rows.

        Raises:
            AdapterError: they can't act together.
        """
        plan = self.active.current()
        given = self.active.given.get(("tasks", thread_id()), plan.tasks)
        tasks = tasks_of_rows(given, rows, device, plan.copies)
        if plan.groups is None:
            prompt = self._prompt(plan.steps, rows, tasks, marker)
            is_after = self._is_after_first(plan.steps)
            return None if prompt is None else Woven(prompt, None, is_after)
        found: list[tuple[RowsAt, int, Tensor | None]] = []
        for steps, at in self.mixed_rows(rows, device):
            own = None if tasks is None else taken(tasks, at)
            n = at.stop - at.start if isinstance(at, slice) else len(at)
            found.append((at, n, self._prompt(steps, n, own, marker)))
        some = [prompt for _, _, prompt in found if prompt is not None]
        if not some:
            return None
        most = max(prompt.shape[1] for prompt in some)
        after = self._is_after_first(tuple(step for steps, _ in plan.groups for step in steps))
        prompts: list[tuple[RowsAt, Tensor]] = []
        lengths: list[tuple[RowsAt, Tensor]] = []
        for at, n, prompt in found:
            own = some[0].new_zeros(n, 0, some[0].shape[2]) if prompt is None else prompt
            prompts.append((at, F.pad(own, (0, 0, most - own.shape[1], 0))))
            lengths.append((at, torch.full((n,), own.shape[1], device=device)))
        differ = any(prompt is None or prompt.shape[1] < most for _, _, prompt in found)
        return Woven(joined(prompts), joined(lengths) if differ else None, after)

    def _prompt(
        self, steps: Steps, rows: int, tasks: Tensor | None, marker: int | None
    ) -> Tensor | None:
        """Returns the virtual tokens of some steps one after the other, `(rows, m, width)`."""
        parts: list[Tensor] = []
        for step in steps:
            if isinstance(step, str):
                delta = self._modules.get(step)
                if isinstance(delta, EmbeddingDelta) and delta.marker == marker:
                    own = checked_tasks(tasks, delta.tasks, step) if delta.tasks else None
                    parts.append(delta.prompt(own).expand(rows, -1, -1))
            elif isinstance(step, Mean):
                mean = self._mean(step, rows, tasks, marker)
                parts += [] if mean is None else [mean]
        return torch.cat(parts, dim=1) if parts else None

    def _mean(
        self, mean: Mean, rows: int, tasks: Tensor | None, marker: int | None
    ) -> Tensor | None:
        made = [(w, self._prompt(steps, rows, tasks, marker)) for w, steps in mean.branches]
        lengths = [0 if prompt is None else prompt.shape[1] for _, prompt in made]
        if len(set(lengths)) > 1:
            raise AdapterError(
                "Average takes prompts of one length, found members with "
                f"{', '.join(map(str, lengths))} virtual tokens."
            )
        weighted = [weight * prompt for weight, prompt in made if prompt is not None]
        return torch.stack(weighted).sum(0) if weighted else None

    def _keeps(self) -> bool:
        """Whether the active prompts stay in what the body answers."""
        names = self.active.current().names
        deltas: list[Any] = [self._modules[name] for name in names if name in self._modules]
        found = {delta.stays for delta in deltas if delta.marker is None}
        if len(found) > 1:
            raise AdapterError(
                "Prompts that act together must all stay in the answer, or none (stays=)."
            )
        return found.pop() if found else False

    def _is_after_first(self, steps: Steps) -> bool:
        names = [name for name in dict.fromkeys(names_in(steps)) if name in self._modules]
        deltas: dict[str, Any] = {name: self._modules[name] for name in names}
        found = {delta.is_after_first for delta in deltas.values() if delta.marker is None}
        if len(found) > 1:
            raise AdapterError(
                f"The prompts {', '.join(names)} act together, so all must be in the same "
                'position: "front" or "after-first".'
            )
        return found.pop() if found else False
