"""The prompts of a transfer: which directories they lie in, what they are called, their tokens."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftune.errors import AdapterError, FormatError, SettingsError

if TYPE_CHECKING:
    from torch import Tensor

    from graftune.tasks.settings import RunSettings

TARGET = "(target)"
"""The target's key among the prompts: no source can be called so."""


def named(target: str | Path, sources: Sequence[str | Path]) -> dict[str, str]:
    """Returns the sources by short names, made of their directories'.

    Raises:
        SettingsError: two are the same, or one is the target.

    Example:
        >>> named("runs/new", ["runs/a", "runs/b/adapter", "old/a"])
        {'a': 'runs/a', 'b': 'runs/b/adapter', 'a-2': 'old/a'}
    """
    found: dict[str, str] = {}
    seen = {_place(target): ""}
    for source in map(str, sources):
        place = _place(source)
        if place in seen:
            what = "the target itself" if seen[place] == "" else f'"{seen[place]}" once more'
            raise SettingsError(f'the source "{source}" is {what}: give each prompt once.')
        seen[place] = source
        name = _name(Path(source))
        same = [key for key in found if key == name or re.fullmatch(rf"{name}-\d+", key)]
        found[f"{name}-{len(same) + 1}" if name in found else name] = source
    return found


WANTED = "its run.yaml would say what is trained on what: give the target's settings (--settings)."


def settings_of(target: str | Path, wanted: str = WANTED) -> RunSettings:
    """Returns the settings of the run that a directory is, or is in.

    Raises:
        SettingsError: it is in none; `wanted` tells what for.
    """
    from graftune.tasks.workspace import SETTINGS, read_settings

    place = Path(target).absolute()
    for folder in (place, place.parent, place.parent.parent):
        if (folder / SETTINGS).is_file():
            return read_settings(folder)
    raise SettingsError(f"\"{target}\" isn't in a run's directory: {wanted}")


def prompts(settings: RunSettings, folders: Mapping[str, str]) -> dict[str, Tensor]:
    """Returns the virtual tokens, (m, d), of adapters by name; TARGET's length is everybody's.

    Raises:
        FormatError: a directory holds no adapter, or one for another base.
        SettingsError: one is no soft prompt at the input, or of another length.
    """
    from graftune.methods._soft_prompts import prompt_of

    model, found = _base(settings), dict[str, Any]()
    for at, (name, given) in enumerate(folders.items()):
        try:
            found[name] = prompt_of(_loaded(model, given, f"prompt-{at}", settings.base)).cpu()
        except AdapterError as error:
            raise SettingsError(f'"{given}" has no prompt to transfer. {error}') from error
        _detach(model, f"prompt-{at}")
        lengths = len(found[name]), len(found[TARGET])
        if lengths[0] != lengths[1]:
            raise SettingsError(
                f'"{given}" has {lengths[0]} virtual tokens and the target {lengths[1]}: they must '
                "have one length."
            )
    return found


def save(settings: RunSettings, tokens: Tensor, folder: Path) -> None:
    """Writes an adapter of the settings' method with given virtual tokens.

    Raises:
        SettingsError: the method is no soft prompt, or of another length.
    """
    from graftune.adapter import attach
    from graftune.methods._soft_prompts import SoftPrompt, spread
    from graftune.tasks.resolving import method_of

    method, model = method_of(settings.method), _base(settings)
    if not isinstance(method, SoftPrompt):
        raise SettingsError(f"method is {method.name}, expected PromptTuning.")
    adapter = attach(model, method, "start", seed=settings.train.seed)
    values = spread(adapter, tokens)
    if not values.keys() <= adapter.state_dict().keys():
        raise SettingsError(f"{method.name} doesn't hold its virtual tokens; take PromptTuning.")
    try:
        adapter.load_state_dict(values, strict=False)
    except FormatError as error:
        raise SettingsError(f"no start of the average: {error}") from error
    adapter.save(folder)


def _base(settings: RunSettings) -> Any:
    from graftune.tasks.models import load_base
    from graftune.tasks.quantising import Quantising
    from graftune.tasks.resolving import precision
    from graftune.tasks.task import find_task

    task = find_task(settings.task, settings.task_options)
    labels = ["0", "1"] if task.new_head else None
    return load_base(
        settings.base,
        task.model_task,
        labels=labels,
        dtype=precision(settings),
        quantize=Quantising.asked(settings.train),
    ).model


def _loaded(model: Any, given: str, name: str, base: str) -> Any:
    from graftune.formats import load
    from graftune.methods._soft_prompts import SoftPrompt
    from graftune.methods.base import Method
    from graftune.tasks import beside

    place = beside.folder_of(given)
    own = beside.look_at(place, base)
    method = Method.from_dict(own["method"]) if own else None
    if method is not None and not isinstance(method, SoftPrompt):
        raise AdapterError(f"It is {method.name}, which has no virtual tokens at the input.")
    return load(model, place, name, head=False)


def _detach(model: Any, name: str) -> None:
    from graftune.adapter import activate, detach

    activate(model, None)
    detach(model, name)


def _place(given: str | Path) -> Path:
    """Returns which adapter's folder a directory is, without fetching what isn't here."""
    from graftune.tasks.workspace import ADAPTER

    place = Path(given)
    return (place / ADAPTER if (place / ADAPTER).is_dir() else place).resolve()


def _name(place: Path) -> str:
    """Returns what a directory's prompt is called: as its run, with a checkpoint's number."""
    parts = [part for part in place.absolute().parts if part not in ("adapter", "checkpoints")]
    is_checkpoint = parts[-1].startswith("checkpoint-")
    text = "-".join(parts[-2:] if is_checkpoint else parts[-1:])
    return re.sub(r"[^A-Za-z0-9_-]", "-", text).strip("-") or "source"
