"""A composition made ready for the sites: what acts on which rows, and in which blocks."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from graftune.composition import (
    AdapterDrop,
    Composition,
    Rows,
    Steps,
    copies_of,
    members_of,
    names_in,
    steps_of,
)
from graftune.errors import AdapterError

RowsAt = slice | Tensor
"""Rows of a batch: a run of them, or their numbers."""
ALWAYS = 1 << 30
"""Layer of a site that no drop reaches."""


@dataclass(eq=False)
class Plan:
    """A composition made ready for the sites.

    Either `steps` act on every row, or `groups` says which steps act on which of `size` rows.
    """

    composition: Composition
    names: tuple[str, ...]
    """Every adapter that takes part."""
    steps: Steps
    groups: tuple[tuple[Steps, tuple[int, ...]], ...] | None = None
    size: int = 1
    copies: int = 1
    """How often each row of the batch is computed."""
    drop: int = 0
    """Blocks of each stack, from the lowest, in which nothing acts."""
    schedule: AdapterDrop = field(default_factory=AdapterDrop)
    tasks: tuple[int, ...] = ()
    """Tasks of the rows, one for all or one for each, for adapters that have several."""
    lowest: tuple[int | None] | None = None
    """Before which block rows are copied, None in it for the inputs; once it was looked up."""
    copying: set[int] = field(default_factory=set)
    """Threads in a pass of the whole model that copies its rows."""
    is_inner: bool = False
    """Whether a host is run again for some rows, so that what comes after it must wait."""
    _indices: dict[tuple[int, int, torch.device], Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        composition: Composition,
        drop: int | AdapterDrop | None = None,
        tasks: tuple[int, ...] = (),
    ) -> Plan:
        """Returns the plan of a composition."""
        schedule, copies = AdapterDrop.of(drop), copies_of(composition)
        members = composition.members if isinstance(composition, Rows) else copies
        rows: dict[Steps, list[int]] = {}
        for row, member in enumerate(members):
            rows.setdefault(steps_of(member), []).append(row)
        alike = next(iter(rows)) if len(rows) == 1 else ()
        plan = cls(
            composition,
            members_of(composition),
            steps=alike if members else steps_of(composition),
            size=len(members) or 1,
            copies=len(copies) or 1,
            drop=schedule.rest,
            schedule=schedule,
            tasks=tasks,
        )
        if len(rows) > 1:
            plan.groups = tuple((steps, tuple(at)) for steps, at in rows.items())
        return plan

    def inner(self, steps: Steps) -> Plan:
        """Returns the plan in which some steps act on every row that a host is given again."""
        return Plan(None, tuple(names_in(steps)), steps, drop=self.drop, is_inner=True)

    @contextlib.contextmanager
    def copied(self) -> Iterator[None]:
        """Lets rows be told apart inside the block, where they were copied before it."""
        thread = threading.get_ident()
        is_new = self.copies > 1 and thread not in self.copying
        if is_new:
            self.copying.add(thread)
        try:
            yield
        finally:
            if is_new:
                self.copying.discard(thread)

    def drawn(self, training: bool) -> Plan:
        """Returns the plan of the next pass: with a number of dropped blocks drawn, in training."""
        low, high = self.schedule.low, self.schedule.high
        drop = self.schedule.rest
        if training:
            drop = low if low == high else int(torch.randint(low, high + 1, (), device="cpu"))
        return self if drop == self.drop else dataclasses.replace(self, drop=drop)

    def rows(self, group: int, batch: int, device: torch.device) -> RowsAt:
        """Returns the rows of a batch of k * size that belong to a group: a run, or `(n,)` int64.

        Raises:
            AdapterError: if the batch isn't a multiple of the rows named.
        """
        assert self.groups is not None
        self._check_batch(batch)
        members, k = self.groups[group][1], batch // self.size
        if members[-1] - members[0] == len(members) - 1:
            return slice(members[0] * k, (members[-1] + 1) * k)
        key = (group, batch, device)
        if key not in self._indices:
            at = torch.tensor(members, device=device)
            self._indices[key] = (at[:, None] * k + torch.arange(k, device=device)).flatten()
        return self._indices[key]

    def _check_batch(self, batch: int) -> None:
        if self.copies > 1 and threading.get_ident() not in self.copying:
            raise AdapterError(
                "Parallel copies the rows in a forward pass of the whole model, and this was a "
                "part of it alone (as generate runs an encoder): copy the inputs and take Rows."
            )
        if batch % self.size:
            raise AdapterError(
                f"Rows names {self.size} rows, but a module saw a batch of {batch}: give one "
                "member per row of the batch."
            )


def taken(tensor: Tensor, at: RowsAt) -> Tensor:
    """Returns some rows of a tensor, without a copy where they follow each other."""
    return tensor[at] if isinstance(at, slice) else tensor.index_select(0, at)


def joined(parts: Sequence[tuple[RowsAt, Tensor]]) -> Tensor:
    """Returns one tensor from parts that cover its rows; each is copied once or twice."""
    runs = all(isinstance(at, slice) for at, _ in parts)
    if runs:
        ordered = sorted(parts, key=lambda part: part[0].start)  # type: ignore[union-attr]
        return torch.cat([part for _, part in ordered])
    device = parts[0][1].device
    order = torch.cat(
        [
            torch.arange(at.start, at.stop, device=device) if isinstance(at, slice) else at
            for at, _ in parts
        ]
    )
    return torch.cat([part for _, part in parts]).index_select(0, order.argsort())
