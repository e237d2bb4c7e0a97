"""The position site: a body's real tokens stand later, by as many positions as prefixes take.

    position_ids = those given, or those that the body would count by itself, + m

Prefixes of attentions have no position by themselves. HF PEFT puts them into the cache, where they
take the first positions: a prefix trained so asks for the same here.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from graftune.anatomy import Anatomy, Stack
from graftune.composition import Mean, Steps
from graftune.errors import AdapterError, SettingsError
from graftune.sites.base import Delta, Graft, PositionPlace, Site
from graftune.sites.entrance import PositionTable, above
from graftune.sites.plan import RowsAt, joined
from graftune.sites.state import Active


class PositionShift(Delta):
    """How many positions an adapter's prefixes take; it has no tensors."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length


class PositionSite(Site):
    """Deltas on the positions that a body is told."""

    def __init__(self, active: Active) -> None:
        super().__init__(active)
        self.arguments: tuple[str, ...] = ()
        self.table = PositionTable()

    def hook(self, host: nn.Module) -> None:
        """Registers `before`."""
        self.arguments = tuple(inspect.signature(host.forward).parameters)
        self.table = PositionTable.of(host)
        self.handles = [host.register_forward_pre_hook(self.before, with_kwargs=True)]

    def before(self, host: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Moves the positions. A forward pre-hook.

        Raises:
            AdapterError: there are not so many, or members of an Average differ.
        """
        plan = self.active.current()
        lengths = [self._length(steps) for steps, _ in plan.groups or ((plan.steps, ()),)]
        if not any(lengths):
            return None
        given = {**dict(zip(self.arguments, args, strict=False)), **kwargs}
        ids = given.get("input_ids")
        tokens: Tensor = given["inputs_embeds"] if ids is None else ids
        self._check_room(host, given, tokens, max(lengths))
        positions = given.get("position_ids")
        if positions is None:
            positions = self._counted(given, tokens)
        shift = lengths[0] if plan.groups is None else self._by_row(len(tokens), tokens.device)
        return (), {**given, "position_ids": positions + shift}

    def _counted(self, given: dict[str, Any], tokens: Tensor) -> Tensor:
        """Returns the positions that the body would count by itself, `(1 or B, tokens)`."""
        past, length = _past(given), int(tokens.shape[1])
        mask, padding, ids = given.get("attention_mask"), self.table.padding, given.get("input_ids")
        if self.table.is_from_mask and isinstance(mask, Tensor) and mask.ndim == 2:
            return (mask.cumsum(1) * mask - 1)[:, past:].long()
        if padding is not None and ids is not None:
            real = (ids != padding).long()
            return (real.cumsum(1) + past) * real + padding
        start = past if padding is None else past + padding + 1
        return torch.arange(start, start + length, device=tokens.device)[None]

    def _by_row(self, batch: int, device: torch.device) -> Tensor:
        """Returns by how much each row is moved, `(B, 1)`."""
        parts: list[tuple[RowsAt, Tensor]] = []
        for steps, at in self.mixed_rows(batch, device):
            rows = at.stop - at.start if isinstance(at, slice) else len(at)
            parts.append((at, torch.full((rows, 1), self._length(steps), device=device)))
        return joined(parts)

    def _length(self, steps: Steps) -> int:
        """Returns the positions that some steps take together."""
        total = 0
        for step in steps:
            if isinstance(step, str):
                total += getattr(self._modules.get(step), "length", 0)
            elif isinstance(step, Mean):
                found = {self._length(branch) for _, branch in step.branches}
                if len(found) > 1:
                    raise AdapterError(
                        "Average takes prefixes that move tokens by one number of positions, found "
                        f"members that move them by {', '.join(map(str, sorted(found)))}."
                    )
                total += found.pop()
        return total

    def _check_room(
        self, host: nn.Module, given: dict[str, Any], tokens: Tensor, shift: int
    ) -> None:
        limit = self.table.limit
        if limit is None:
            return
        length = _past(given) + int(tokens.shape[1])
        if length + shift > limit:
            raise AdapterError(
                f"{length} tokens and prefixes that take {shift} positions are more than the "
                f"{limit} positions of this {type(host).__name__}: shorten the text, or attach the "
                "prefix without shift_positions."
            )


def _past(given: dict[str, Any]) -> int:
    """Returns how many tokens the cache holds."""
    cache = given.get("past_key_values")
    return 0 if cache is None else int(cache.get_seq_length())


def shifts(method: str, model: nn.Module, anatomy: Anatomy, length: int) -> list[Graft]:
    """Returns the grafts that move the tokens of every stack.

    Raises:
        SettingsError: a stack is told no positions.
    """
    bodies = {stack.kind: _body(model, stack) for stack in anatomy.stacks}
    for kind, body in bodies.items():
        if body is None:
            raise SettingsError(
                f"{method}: shift_positions moves the positions that a model is told, and the "
                f"{kind} of this {type(model).__name__} takes no position_ids (images have a place "
                "each, T5 and BLOOM relative positions alone, BART counts by itself): leave it "
                "False."
            )
    found = dict.fromkeys(body for body in bodies.values() if body is not None)
    return [Graft(PositionPlace(body), PositionShift(length)) for body in found]


def _body(model: nn.Module, stack: Stack) -> str | None:
    """Returns the module around a stack that is told positions."""
    return None if stack.kind == "vision" else above(model, stack.blocks[0].path, {"position_ids"})
