"""Directories that are replaced whole or not at all.

    with replacing(path) as folder:      # holds the lock beside `path`
        (folder / "a.json").write_text(...)
    # synced to disk, then exchanged with what was at `path` in one step

A reader, a crash or `kill -9` at any moment finds the old directory or the new one. Beside
`path` there may lie, while a save runs or after it was killed, `.NAME.new` (being written, or the
replaced one being removed), `.NAME.old` (only where the kernel can't exchange two directories) and
`.NAME.lock`. The next save or load of `path` clears them up.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from graftune.errors import FormatError

LOCK_TIMEOUT_S = 60.0
OWN_FILES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
    "graftune.json",
)
CARD = "README.md"

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_READ_ATTEMPTS = 20
_Read = TypeVar("_Read")


@contextlib.contextmanager
def replacing(path: Path, *, timeout_s: float | None = None) -> Iterator[Path]:
    """Yields an empty folder that becomes `path` when the block ends without an exception.

    What lies in an existing `path` and isn't an adapter's own file is kept (linked, not copied).

    Raises:
        FormatError: `path` can't be written (full disk, no permission, not a directory), or
            another process goes on writing it for `timeout_s` seconds, LOCK_TIMEOUT_S if
            None. `path` is unchanged then.
    """
    target = _writable_target(path)
    with _telling_what_failed(target), locked(target, timeout_s=timeout_s):
        _clear_leftovers(target)
        folder = _beside(target, "new")
        try:
            folder.mkdir()
            yield folder
            _keep_foreign_files(target, folder)
            sync_tree(folder)
            _put_in_place(folder, target)
            sync(target.parent)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def read_whole(path: Path, read: Callable[[Path], _Read]) -> _Read:
    """Returns `read(path)` for one version of `path`, though a save may exchange it meanwhile.

    Raises:
        FormatError: there is no directory at `path`, or writers hold its lock all the time.
    """
    target = Path(os.path.abspath(path)).resolve()
    if not target.exists() and _beside(target, "old").exists():
        with locked(target):
            _clear_leftovers(target)
    for _ in range(_READ_ATTEMPTS):
        if not target.is_dir():
            raise FormatError(f'no adapter directory at "{path}": {_what_is_there(target)}.')
        held = os.open(target, os.O_RDONLY)  # an open directory's inode isn't given to another
        try:
            result = read(target)
            if os.fstat(held).st_ino == _inode(target):
                return result
        except Exception:  # whatever two versions mixed led to: read again
            if os.fstat(held).st_ino == _inode(target):
                raise
        finally:
            os.close(held)
    with locked(target):  # a reader without luck lets the writers wait for once
        return read(target)


@contextlib.contextmanager
def locked(target: Path, *, timeout_s: float | None = None) -> Iterator[None]:
    """Holds the lock of `target`: one writer at a time, over processes and threads.

    Raises:
        FormatError: the lock isn't free within `timeout_s` seconds; the message names its holder.
    """
    import fcntl  # POSIX only

    lock = _beside(target, "lock")
    until = time.monotonic() + (LOCK_TIMEOUT_S if timeout_s is None else timeout_s)
    while True:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _wait_for(handle, until, target)
            if _inode(lock) == os.fstat(handle).st_ino:
                break
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # its last holder removed the file: the lock is another file now
    try:
        os.truncate(handle, 0)
        os.pwrite(handle, str(os.getpid()).encode(), 0)
        yield
    finally:
        lock.unlink(missing_ok=True)
        fcntl.flock(handle, fcntl.LOCK_UN)
        os.close(handle)


def _wait_for(handle: int, until: float, target: Path) -> None:
    import fcntl

    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= until:
                holder = os.pread(handle, 20, 0).decode(errors="replace") or "unknown"
                raise FormatError(
                    f'"{target}" is being written by another process (pid {holder}), which did '
                    "not finish in time; wait for it or save elsewhere."
                ) from None
            time.sleep(0.01)


def _writable_target(path: Path) -> Path:
    target = Path(os.path.abspath(path)).resolve()
    if target.exists() and not target.is_dir():
        raise FormatError(f'"{path}" is a file; an adapter is saved as a directory.')
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FormatError(f'can\'t make the folder "{target.parent}": {error.strerror}.') from error
    return target


@contextlib.contextmanager
def _telling_what_failed(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        kept = "what was there is unchanged" if target.exists() else "nothing was written"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(target.parent).free
            reason = f"the disk is full ({free:,} bytes free)"
        elif error.errno == errno.EBUSY:
            reason = "it is a mount point, which can't be replaced; save in a folder below it"
        else:
            reason = error.strerror or str(error)
        raise FormatError(f'can\'t save to "{target}": {reason}; {kept}.') from error


def _beside(target: Path, kind: str) -> Path:
    return target.parent / f".{target.name}.{kind}"


def _inode(path: Path) -> int | None:
    try:
        return os.stat(path).st_ino
    except FileNotFoundError:
        return None


def _what_is_there(target: Path) -> str:
    if target.exists():
        return "that is a file"
    near = next((parent for parent in target.parents if parent.is_dir()), target.parent)
    return f'"{near}" has no "{target.relative_to(near).parts[0]}"'


def _clear_leftovers(target: Path) -> None:
    """Undoes a save that was killed; the caller holds the lock."""
    old = _beside(target, "old")
    if old.exists() and not target.exists():
        os.rename(old, target)
    for leftover in (old, _beside(target, "new")):
        if leftover.exists():
            shutil.rmtree(leftover)


def _keep_foreign_files(target: Path, folder: Path) -> None:
    """Links into `folder` what else lies in `target`: tokenizer, reports, notes, checkpoints."""
    if not target.is_dir():
        return
    was_adapter = (target / OWN_FILES[0]).exists()
    for entry in sorted(os.scandir(target), key=lambda entry: entry.name):
        if entry.name in OWN_FILES or (entry.name == CARD and was_adapter):
            continue
        new = folder / entry.name
        new.unlink(missing_ok=True)  # a README that isn't a card is the user's
        if entry.is_dir(follow_symlinks=False):
            shutil.copytree(entry.path, new, symlinks=True, copy_function=_link)
        else:
            _link(entry.path, str(new))


def _link(source: str, to: str) -> str:
    try:
        os.link(source, to, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, to, follow_symlinks=False)
    return to


def sync_tree(folder: Path) -> None:
    """Makes a folder's files and names last through a loss of power."""
    for path in (*folder.rglob("*"), folder):
        if not path.is_symlink():
            sync(path)


def sync(path: Path) -> None:
    """Makes a file, or a folder's names, last through a loss of power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _put_in_place(folder: Path, target: Path) -> None:
    if not target.exists():
        os.rename(folder, target)
    elif not exchange(folder, target):
        old = _beside(target, "old")
        os.rename(target, old)
        try:
            os.rename(folder, target)
        except OSError:
            os.rename(old, target)
            raise
        shutil.rmtree(old, ignore_errors=True)


def exchange(one: Path, other: Path) -> bool:
    """Swaps two directories in one step; False where the kernel or file system can't.

    Source: renameat2(2) with RENAME_EXCHANGE, Linux 3.15, glibc 2.28.
    """
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    paths = os.fsencode(one), os.fsencode(other)
    if call(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL):
        return False
    raise OSError(code, os.strerror(code), str(other))
