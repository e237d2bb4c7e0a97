"""Runs that start from another adapter's values: `start`, its run's directory or its own.

The head keeps its own start. A resumed run goes on from its checkpoint, wherever the other lies.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftune.errors import AdapterError, FormatError, SettingsError
from graftune.tasks import beside
from graftune.tasks.settings import RunSettings
from graftune.tasks.workspace import CHECKPOINTS, RESULT

if TYPE_CHECKING:
    from graftune.adapter import Adapter
    from graftune.methods.base import Method

SOURCE = "start"
"""What the other is called while its values are taken."""


def folder(settings: RunSettings, method: Method, earlier: Path | None = None) -> Path | None:
    """Returns the folder of the adapter that a run starts from, looked at; None without one.

    Args:
        settings: The run's.
        method: What it trains.
        earlier: Directory of the run that goes on: once it has a checkpoint it needs no start.

    Raises:
        FormatError: It holds no adapter, or one for another base.
        SettingsError: Its method or its length is another.
    """
    if settings.start is None or (earlier is not None and _has_begun(earlier)):
        return None
    try:
        place = beside.folder_of(settings.start)
        own = beside.look_at(place, settings.base)
    except FormatError as error:
        raise type(error)(f"start: {error}") from error
    _check(settings.start, own, method)
    return place


def take(adapter: Adapter, place: Path, given: str) -> str:
    """Gives an adapter that was just attached the values of another; returns what to tell.

    Args:
        adapter: The run's, active.
        place: The other's folder.
        given: What the settings call it.

    Raises:
        FormatError: It can't be read, or is for another base.
        SettingsError: Its tensors are others.
    """
    from graftune.adapter import activate, detach
    from graftune.formats import load

    name = SOURCE if adapter.name != SOURCE else f"{SOURCE}-from"
    try:
        adapter.start_from(load(adapter.model, place, name, head=False))
    except AdapterError as error:
        raise SettingsError(f'start is "{given}": {error}') from error
    finally:
        activate(adapter.model, adapter.name)
    detach(adapter.model, name)
    return f'The adapter starts from "{given}".'


def _has_begun(run_dir: Path) -> bool:
    from graftune.training.checkpoints import last_checkpoint

    is_finished = (run_dir / RESULT).exists()
    return is_finished or last_checkpoint(run_dir / CHECKPOINTS) is not None


def _check(given: str, own: dict[str, Any], method: Method) -> None:
    """Raises SettingsError if what is written down of the other says that it is no start."""
    from graftune.methods._soft_prompts import SoftPrompt
    from graftune.methods.base import Method as AnyMethod

    if method.trains_in_place:
        raise SettingsError(
            f'start is "{given}", but {method.name} trains the base in place: merge the other into '
            "the base, and start from that."
        )
    if not own:
        return
    other = AnyMethod.from_dict(own["method"])
    are_prompts = isinstance(method, SoftPrompt) and isinstance(other, SoftPrompt)
    if other.trains_in_place or not (are_prompts or type(method) is type(other)):
        like = "any soft prompt at the input" if isinstance(method, SoftPrompt) else method.name
        raise SettingsError(
            f'start is "{given}", which is {other.name}; {method.name} starts from {like}.'
        )
    lengths = [getattr(one, "length", None) for one in (other, method)]
    if None not in lengths and lengths[0] != lengths[1]:
        raise SettingsError(
            f'start is "{given}", of length {lengths[0]}; method.length is {lengths[1]}, and must '
            "be the same."
        )
