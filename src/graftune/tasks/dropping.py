"""AdapterDrop in runs: the lowest blocks left without adapters, always or drawn in training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from graftune.composition import AdapterDrop
from graftune.errors import AdapterError, SettingsError
from graftune.tasks.settings import RunSettings

if TYPE_CHECKING:
    from graftune.adapter import Adapter
    from graftune.methods.base import Method

Drop = int | tuple[int, int]


def schedule(drop: Drop) -> AdapterDrop:
    """Returns what `train.drop` means: a number always, or a pair's in training alone.

    Example:
        >>> schedule(2), schedule((0, 5))
        (AdapterDrop(low=2, high=2, rest=2), AdapterDrop(low=0, high=5, rest=0))
    """
    return AdapterDrop.of(drop) if isinstance(drop, int) else AdapterDrop(*drop)


def check(settings: RunSettings, method: Method) -> None:
    """Raises SettingsError if a method has nothing that could be dropped."""
    if settings.train.drop and method.trains_in_place:
        raise SettingsError(
            f"train.drop is {_shown(settings.train.drop)}, but {method.name} trains the base in "
            "place, so that no block can be left out; method.keep_base=true would let it."
        )


def activate(adapter: Adapter, drop: Drop) -> str | None:
    """Lets an adapter act with the lowest blocks left out; returns what to tell the user.

    Raises:
        SettingsError: The model has fewer blocks, or nothing is left that trains.
    """
    from graftune.adapter import activate as act

    if not drop:
        return None
    found, depth = schedule(drop), adapter.anatomy.depth
    try:
        act(adapter.model, adapter.name, drop=found)
    except AdapterError as error:
        raise SettingsError(f"drop is {_shown(drop)}: {error}") from error
    if found.low == found.high:
        return f"The lowest {found.low} of {depth} blocks have no adapter, now and later."
    return (
        f"Each training pass leaves out the adapter in the lowest {found.low} to {found.high} of "
        f"{depth} blocks, drawn anew; otherwise it acts in all."
    )


def check_trains(adapter: Adapter, drop: Drop) -> None:
    """Raises SettingsError if a drop leaves nothing that trains: it must, in each pass."""
    from graftune.sites.placing import block_of

    positions = adapter.anatomy.positions
    found = [block_of(graft.place.module, positions) for graft in adapter.grafts]
    highest = max((len(positions) if at is None else at for at in found), default=0)
    if schedule(drop).high > highest:
        raise SettingsError(
            f'train.drop is {_shown(drop)}, which leaves nothing of "{adapter.name}" to train: '
            f"drop {highest} blocks at most."
        )


def _shown(drop: Drop) -> str:
    return str(drop) if isinstance(drop, int) else str(list(drop))
