"""Adapters beside a run's own: what its method attends to, from directories of their own.

They are attached first, by name, frozen and without their heads. The run keeps a copy of each in
`beside/NAME`, so that it is resumed and predicts wherever it lies.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftune.errors import FormatError, SettingsError, nearest
from graftune.tasks.settings import RunSettings
from graftune.tasks.workspace import ADAPTER, BESIDE

if TYPE_CHECKING:
    from torch import nn

    from graftune.methods.base import Method


def check_names(settings: RunSettings, method: Method) -> None:
    """Checks that `beside` names the adapters that a method attends to, and no others.

    Raises:
        SettingsError: One is missing, is of no use, or is called as the run's own.
    """
    from graftune.composition import members_of

    needed = list(dict.fromkeys(n for member in method.fuses for n in members_of(member)))
    given = list(settings.beside)
    for name in needed:
        if name not in given:
            raise SettingsError(
                f'{method.name} attends to "{name}", which beside doesn\'t name: give its '
                f"directory, as in beside: {{{name}: runs/{name}}}.{nearest(name, given)}"
            )
    for name in given:
        if name not in needed:
            listed = ", ".join(needed) or "none"
            raise SettingsError(
                f'beside names "{name}", which {method.name} has no use for (it attends to '
                f"{listed}).{nearest(name, needed)}"
            )
    if settings.run_name in given:
        raise SettingsError(
            f'beside names "{settings.run_name}", which is the run\'s own name: choose another.'
        )


def folders(settings: RunSettings, kept: Path | None = None) -> dict[str, Path]:
    """Returns the adapters' folders by name, each looked at: of a resumed run, its own copies.

    Args:
        settings: The run's.
        kept: Directory of the run that goes on.

    Raises:
        FormatError: One holds no adapter, or one for another base.
    """
    found: dict[str, Path] = {}
    for name, given in settings.beside.items():
        copy = kept / BESIDE / name if kept is not None else None
        try:
            found[name] = copy if copy is not None and copy.is_dir() else folder_of(given)
            look_at(found[name], settings.base)
        except FormatError as error:
            raise type(error)(f"beside.{name}: {error}") from error
    return found


def keep(found: Mapping[str, Path], run_dir: Path) -> dict[str, Path]:
    """Copies the adapters' files into a run's directory; returns where they lie there.

    Raises:
        FormatError: They can't be written.
    """
    from graftune.formats.atomic import replacing

    copies = {name: run_dir / BESIDE / name for name in found}
    for name, copy in copies.items():
        if found[name] != copy:
            with replacing(copy) as part:
                for file in _files(found[name]):
                    shutil.copy2(file, part / file.name)
    return copies


def kept(directory: Path, names: Sequence[str]) -> dict[str, Path]:
    """Returns where the adapters of a finished run lie; `directory` is the run's or its adapter's.

    Raises:
        FormatError: They don't lie there.
    """
    for place in (directory, directory.absolute().parent):
        found = {name: place / BESIDE / name for name in names}
        if all(path.is_dir() for path in found.values()):
            return found
    raise FormatError(
        f'"{directory}" attends to the adapters {", ".join(names)}, which lie in its run\'s '
        f"directory, in {BESIDE}/: give that directory."
    )


def attach(model: nn.Module, found: Mapping[str, Path]) -> None:
    """Attaches adapters without their heads, frozen, and lets the base act.

    Raises:
        FormatError: One can't be read, or is for another base.
    """
    from graftune.adapter import activate
    from graftune.formats import load

    for name, folder in found.items():
        load(model, folder, name, head=False).trainable = False
    if found:
        activate(model, None)


def folder_of(given: str | Path) -> Path:
    """Returns the folder of an adapter: a run's own, one itself, or one fetched from the hub.

    Raises:
        FormatError: It is to be fetched, and can't be.
    """
    from graftune.formats.hub import located

    place = located(given)
    return place / ADAPTER if (place / ADAPTER).is_dir() else place


def look_at(folder: Path, base: str) -> dict[str, Any]:
    """Returns what graftune wrote down of a folder's adapter; {} if another program wrote it.

    Raises:
        FormatError: It holds none, or one for another base as far as its sizes say.
    """
    from graftune.formats import directory
    from graftune.formats.adapterhub.folder import is_here, read
    from graftune.formats.atomic import read_whole
    from graftune.formats.base import check_sizes
    from graftune.tasks.models import base_config

    found = read_whole(folder, lambda place: (read if is_here(place) else directory.read)(place))
    where = f'"{folder}"'
    if found.pickle is not None:
        raise FormatError(
            f"{where} keeps its weights as a pickle, {found.pickle}, which a run never reads: "
            "gt.load it with allow_pickle=True and save it again."
        )
    own = found.own or {}
    saved: dict[str, Any] = own.get("base", {})
    config = base_config(base) if saved else None
    if config is not None:
        check_sizes(config, saved, where, f'"{base}"')
    return own


def _files(folder: Path) -> list[Path]:
    """Returns an adapter's own files."""
    from graftune.formats import directory
    from graftune.formats.adapterhub.folder import FILES

    names = (directory.CONFIG, directory.WEIGHTS, directory.OWN, directory.CARD, *FILES)
    return [folder / name for name in dict.fromkeys(names) if (folder / name).is_file()]
