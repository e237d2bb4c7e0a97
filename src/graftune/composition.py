"""Which adapters act now, and how together.

A composition is what `gt.activate` and `gt.using` take: an adapter's name, `None` for the base,
`Stack("a", "b")` for several that act together, or `Rows(["a", None, ...])` for one per row of the
batch. On a linear site a stack adds its members' changes, in the order given.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from graftune.errors import AdapterError, nearest


@dataclass(frozen=True, init=False)
class Stack:
    """Several adapters that act together, each on what the ones before it left.

    Example:
        >>> Stack("language", "task").names
        ('language', 'task')
    """

    names: tuple[str, ...]

    def __init__(self, *names: str) -> None:
        for name in names:
            if not isinstance(name, str):
                raise AdapterError(f"Stack takes adapters' names, found {name!r}.")
        if len(set(names)) != len(names) or not names:
            raise AdapterError(f"Stack needs one or more different names, found {list(names)}.")
        object.__setattr__(self, "names", names)


@dataclass(frozen=True, init=False)
class Rows:
    """One member per row of the batch: a name, a `Stack`, or None for the base.

    A batch of k times as many rows (beams, windows, flattened tokens) gives each member k
    neighbouring rows.

    Example:
        >>> Rows(["a", None, "a"]).names
        ('a',)
    """

    members: tuple[str | Stack | None, ...]

    def __init__(self, members: Iterable[str | Stack | None]) -> None:
        given = tuple(members)
        if not given:
            raise AdapterError("Rows needs one member per row of the batch, found none.")
        for member in given:
            if not (member is None or isinstance(member, str | Stack)):
                raise AdapterError(f"Rows takes names, Stacks or None, found {member!r}.")
        object.__setattr__(self, "members", given)

    @property
    def names(self) -> tuple[str, ...]:
        """The different adapters named, in the order of their first row."""
        return tuple(dict.fromkeys(name for member in self.members for name in members_of(member)))


Composition = str | Stack | Rows | None


def members_of(composition: Composition | list[str] | tuple[str, ...]) -> tuple[str, ...]:
    """Returns the names of the adapters in a composition, in order.

    Raises:
        AdapterError: if it isn't a name, None, a Stack or Rows.
    """
    if composition is None:
        return ()
    if isinstance(composition, str):
        return (composition,)
    if isinstance(composition, Stack | Rows):
        return composition.names
    raise AdapterError(
        f"A composition is a name, None, Stack(...) or Rows([...]), found {composition!r}."
    )


def check_names(composition: Composition, known: Iterable[str]) -> None:
    """Raises AdapterError, with the nearest name, if a member isn't among the `known` adapters."""
    known = list(known)
    for name in members_of(composition):
        if name not in known:
            have = ", ".join(f'"{k}"' for k in known) or "none"
            raise AdapterError(
                f'No adapter is named "{name}"; attached: {have}.{nearest(name, known)}'
            )
