"""Folders that take long to make, made once in the user's cache and never seen half made.

    build ──> .name.<random>.part ──(sizes noted, synced)── rename ──> name

A rename is the only way in, so another process sees nothing or the whole. Two processes that
build at once both succeed: the second to finish drops its copy. A folder that lost a file or was
cut short later no longer matches its list of sizes and is made again.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

CONTENTS = "contents.json"
PART_LIFE_S = 24 * 3600
RENAMES = 5


def cache_folder() -> Path:
    """Returns graftune's cache folder: $GRAFTUNE_CACHE, else the platform's user cache."""
    if chosen := os.environ.get("GRAFTUNE_CACHE"):
        return Path(chosen).expanduser()
    platform = os.environ.get("LOCALAPPDATA" if os.name == "nt" else "XDG_CACHE_HOME")
    return (Path(platform) if platform else Path.home() / ".cache") / "graftune"


def is_whole(folder: Path) -> bool:
    """Returns whether every file that was built into `folder` is there at its full size."""
    try:
        sizes: dict[str, int] = json.loads((folder / CONTENTS).read_text())["bytes"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def built_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """Returns `folder`, filled by `build` unless it is already whole.

    Args:
        folder: where the result lies for good; its parents are made.
        build: writes plain files into the empty folder it is given.

    Raises:
        OSError: the cache can't be written; whatever `build` raises. Nothing is left behind.
    """
    if is_whole(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    _drop_old_parts(folder.parent)
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent))
    try:
        build(part)
        _note_contents(part)
        _move_in(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def _note_contents(part: Path) -> None:
    """Syncs the files of `part` and lists their sizes, so that a loss is noticed."""
    files = sorted(file for file in part.iterdir() if file.is_file())
    sizes = {file.name: file.stat().st_size for file in files}
    (part / CONTENTS).write_text(json.dumps({"bytes": sizes}, indent=1))
    for file in [*files, part / CONTENTS]:
        file.chmod(0o644)
        with file.open("rb+") as opened:
            os.fsync(opened.fileno())
    part.chmod(0o755)  # temporary files keep others out, a lab's shared cache must not


def _move_in(part: Path, folder: Path) -> None:
    """Renames `part` to `folder`, yielding to a whole one and replacing a broken one.

    Raises:
        OSError: the rename is refused though nothing stands in its place.
    """
    for attempt in range(RENAMES):
        try:
            part.rename(folder)
            return
        except OSError:
            if is_whole(folder):
                return
            if attempt == RENAMES - 1:
                raise
        broken = part.with_suffix(".broken.part")
        with contextlib.suppress(FileNotFoundError):  # another process moved it away first
            folder.rename(broken)
        shutil.rmtree(broken, ignore_errors=True)


def _drop_old_parts(parent: Path) -> None:
    """Removes what a killed process left more than a day ago."""
    for part in parent.glob(".*.part"):
        try:
            if time.time() - part.stat().st_mtime > PART_LIFE_S:
                shutil.rmtree(part, ignore_errors=True)
        except FileNotFoundError:
            continue  # another process removed it first
