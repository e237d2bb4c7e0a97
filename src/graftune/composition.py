"""Which adapters act now, and how together.

A composition is what `gt.activate` and `gt.using` take:

    "a"  or None                 one adapter, or the base
    Stack("a", "b")              one after the other: each on what the ones before it left
    Average("a", "b")            the weighted mean of what each would make
    Fuse("a", "b")               their outputs, attended to by a trained gt.AdapterFusion
    Parallel("a", "b")           the batch once per member, what lies below them computed once
    Rows(["a", None, "b"])       one member per row of the batch

What may hold what: Stack a name, Average or Fuse, and Parallel as its last member; Average and Fuse
a name or Stack (Average a Fuse too); Parallel and Rows any but each other, or None.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from graftune.errors import AdapterError, nearest


class _Group:
    """What compositions of several members have in common."""

    members: tuple[Any, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The different adapters named, in order."""
        return tuple(dict.fromkeys(n for m in self.members for n in members_of(m)))


@dataclass(frozen=True, init=False)
class Stack(_Group):
    """Several adapters that act together, each on what the ones before it left.

    Example:
        >>> Stack("language", "task").names
        ('language', 'task')
    """

    members: tuple[Any, ...]

    def __init__(self, *members: Any) -> None:
        _check_members("Stack", members, (str, Average, Fuse, Parallel), least=1)
        for member in members[:-1]:
            if isinstance(member, Parallel):
                raise AdapterError(
                    "Parallel can only be the last member of a Stack, since nothing joins its rows "
                    f"again; found it before {members[-1]!r}."
                )
        object.__setattr__(self, "members", members)


@dataclass(frozen=True, init=False)
class Average(_Group):
    """The weighted mean of what several members would each make of the same input.

    At every place `y + sum of w_i (f_i(y) - y)`, so that a member that has nothing there leaves y.
    Weights are 1/n unless given, and needn't sum to 1.

    Example:
        >>> Average("a", "b", weights=(0.75, 0.25)).weights
        (0.75, 0.25)
    """

    members: tuple[Any, ...]
    weights: tuple[float, ...]

    def __init__(self, *members: Any, weights: Sequence[float] | None = None) -> None:
        _check_members("Average", members, (str, Stack, Fuse))
        given = [1 / len(members)] * len(members) if weights is None else list(weights)
        if len(given) != len(members):
            raise AdapterError(
                f"Average has {len(members)} members and {len(given)} weights: give one for each."
            )
        if not all(isinstance(w, int | float) and math.isfinite(w) for w in given):
            raise AdapterError(f"Average takes finite numbers as weights, found {given}.")
        object.__setattr__(self, "members", members)
        object.__setattr__(self, "weights", tuple(map(float, given)))


@dataclass(frozen=True, init=False)
class Fuse(_Group):
    """Bottleneck adapters whose outputs a trained fusion layer attends to (AdapterFusion).

    `gt.attach(model, gt.AdapterFusion(members=("a", "b")), name="ab")` makes the layers; naming
    "ab" alone means the same.

    Args:
        members: the adapters, or Stacks of them.
        name: the attached AdapterFusion; None for the only one of these members.
    """

    members: tuple[Any, ...]
    name: str | None

    def __init__(self, *members: Any, name: str | None = None) -> None:
        _check_members("Fuse", members, (str, Stack))
        for member in members:
            if isinstance(member, Stack) and not all(isinstance(m, str) for m in member.members):
                raise AdapterError(f"Fuse takes names or Stacks of names, found {member!r}.")
        object.__setattr__(self, "members", members)
        object.__setattr__(self, "name", name)

    @property
    def names(self) -> tuple[str, ...]:
        """The members' names, and the fusion's where it is known."""
        return (*super().names, *((self.name,) if self.name else ()))


@dataclass(frozen=True, init=False)
class Parallel(_Group):
    """The whole batch once for each member; blocks below the first adapter run once for all.

    B rows go in, and n B rows come out: those of the first member, then those of the second, and so
    on. Labels are repeated with them.

    Example:
        >>> Parallel("a", "b").names
        ('a', 'b')
    """

    members: tuple[Any, ...]

    def __init__(self, *members: Any) -> None:
        _check_members("Parallel", members, (str, Stack, Average, Fuse, type(None)))
        object.__setattr__(self, "members", members)


@dataclass(frozen=True, init=False)
class Rows(_Group):
    """One member per row of the batch: a name, a composition, or None for the base.

    A batch of k times as many rows (beams, windows, flattened tokens) gives each member k
    neighbouring rows.

    Example:
        >>> Rows(["a", None, "a"]).names
        ('a',)
    """

    members: tuple[Any, ...]

    def __init__(self, members: Iterable[Any]) -> None:
        given = tuple(members)
        if not given:
            raise AdapterError("Rows needs one member per row of the batch, found none.")
        for member in given:
            if not (member is None or isinstance(member, str | Stack | Average | Fuse)):
                raise AdapterError(
                    f"Rows takes names, Stack, Average, Fuse or None, found {member!r}."
                )
            if isinstance(member, Stack) and isinstance(member.members[-1], Parallel):
                raise AdapterError("Rows can't hold a Parallel: both say which rows are whose.")
        object.__setattr__(self, "members", given)


Composition = str | Stack | Average | Fuse | Parallel | Rows | None


@dataclass(frozen=True)
class AdapterDrop:
    """Leaves out the adapters of the lowest blocks (Rücklé et al. 2021, AdapterDrop).

        gt.activate(model, "task", drop=5)                      # none in blocks 0 to 4
        gt.activate(model, "task", drop=gt.AdapterDrop(high=11))  # each training pass drops 0 to 11

    Blocks are counted in their own stack: an encoder-decoder drops the lowest of both.

    Attributes:
        low: fewest blocks dropped in a training pass.
        high: most of them; the number is drawn evenly, from torch's global generator.
        rest: how many are dropped outside training.
    """

    low: int = 0
    high: int = 0
    rest: int = 0

    def __post_init__(self) -> None:
        numbers = (self.low, self.high, self.rest)
        whole = all(isinstance(n, int) and not isinstance(n, bool) for n in numbers)
        if not whole or min(numbers) < 0 or self.low > self.high:
            raise AdapterError(
                "AdapterDrop takes numbers of blocks, 0 or more and low not above high, found "
                f"low={self.low!r}, high={self.high!r}, rest={self.rest!r}."
            )

    @classmethod
    def of(cls, drop: int | AdapterDrop | None) -> AdapterDrop:
        """Returns what a `drop` argument means: a number drops so many, always."""
        if isinstance(drop, AdapterDrop):
            return drop
        n = 0 if drop is None else drop
        return cls(n, n, n)


@dataclass(frozen=True)
class Mean:
    """An Average made ready: what each member does, and its weight."""

    branches: tuple[tuple[float, Steps], ...]


@dataclass(frozen=True)
class Fused:
    """A Fuse made ready: the fusion's name, and what each member does."""

    name: str
    branches: tuple[Steps, ...]


Step = str | Mean | Fused
Steps = tuple[Step, ...]
"""What acts one after the other."""


def steps_of(composition: Composition) -> Steps:
    """Returns the steps of a composition in which every row is treated alike."""
    if composition is None:
        return ()
    if isinstance(composition, str):
        return (composition,)
    if isinstance(composition, Stack):
        return tuple(step for member in composition.members for step in steps_of(member))
    branches = tuple(steps_of(member) for member in composition.members)
    if isinstance(composition, Average):
        return (Mean(tuple(zip(composition.weights, branches, strict=True))),)
    assert isinstance(composition, Fuse)
    assert composition.name is not None
    return (Fused(composition.name, branches),)


def names_in(steps: Steps) -> Iterator[str]:
    """Yields every adapter that takes part in some steps."""
    for step in steps:
        if isinstance(step, str):
            yield step
        elif isinstance(step, Mean):
            for _, branch in step.branches:
                yield from names_in(branch)
        else:
            for branch in step.branches:
                yield from names_in(branch)
            yield step.name


def copies_of(composition: Composition) -> tuple[Composition, ...]:
    """Returns the members for which the batch is copied; empty unless it is a Parallel.

    Those below a Parallel in a Stack are put below each of its members.
    """
    if isinstance(composition, Parallel):
        return composition.members
    if isinstance(composition, Stack) and isinstance(composition.members[-1], Parallel):
        *below, last = composition.members
        return tuple(_stacked(below, member) for member in last.members)
    return ()


def members_of(composition: Any) -> tuple[str, ...]:
    """Returns the names of the adapters in a composition, in order.

    Raises:
        AdapterError: if it isn't one.
    """
    if composition is None:
        return ()
    if isinstance(composition, str):
        return (composition,)
    if isinstance(composition, _Group):
        return composition.names
    raise AdapterError(
        "A composition is a name, None, Stack(...), Average(...), Fuse(...), Parallel(...) or "
        f"Rows([...]), found {composition!r}."
    )


def trained_in(composition: Composition) -> tuple[str, ...]:
    """Returns the adapters that train while it is active: of a Fuse, the fusion alone."""
    if isinstance(composition, Fuse):
        return (composition.name,) if composition.name else ()
    if not isinstance(composition, _Group):
        return members_of(composition)
    return tuple(dict.fromkeys(n for m in composition.members for n in trained_in(m)))


def check_names(composition: Composition, known: Iterable[str]) -> None:
    """Raises AdapterError, with the nearest name, if a member isn't among the `known` adapters."""
    known = list(known)
    for name in members_of(composition):
        if name not in known:
            have = ", ".join(f'"{k}"' for k in known) or "none"
            raise AdapterError(
                f'No adapter is named "{name}"; attached: {have}.{nearest(name, known)}'
            )


def _stacked(below: list[Any], top: Any) -> Composition:
    above = () if top is None else top.members if isinstance(top, Stack) else (top,)
    return Stack(*below, *above)


def _check_members(
    kind: str, members: tuple[Any, ...], allowed: tuple[type, ...], least: int = 2
) -> None:
    words = {str: "names", type(None): "None"}
    for member in members:
        if not isinstance(member, allowed):
            takes = ", ".join(words.get(t, t.__name__) for t in allowed)
            what = "inside it" if isinstance(member, _Group) else "as a member"
            raise AdapterError(f"{kind} takes {takes}; found {member!r} {what}.")
    if len(members) < least or len(set(members)) != len(members):
        number = "one or more" if least == 1 else "two or more"
        raise AdapterError(f"{kind} needs {number} different members, found {list(members)}.")
