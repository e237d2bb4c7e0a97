"""Checkpoints that are whole or not there, hold the adapters only, and resume exactly.

    checkpoint-120/
      adapter_config.json, adapter_model.safetensors, ...   the adapter, as `adapter.save` writes it
      graftune_state.safetensors   its tensors as training holds them, where the two differ
      graftune_checkpoint.json     methods, data order and sums that resuming compares and restores
      optimizer.pt, scheduler.pt, rng_state.pth, trainer_state.json          the Trainer's own

Several adapters lie in a folder each, of their name. A checkpoint is written beside its place, read
back and compared, synced, and moved there in one step.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graftune.errors import TrainingError
from graftune.formats.atomic import exchange, sync, sync_tree
from graftune.formats.tensors import read_tensors, write_tensors

if TYPE_CHECKING:
    from graftune.adapter import Adapter

MANIFEST = "graftune_checkpoint.json"
STATE = "graftune_state.safetensors"
WEIGHTS = "adapter_model.safetensors"
TRAINER_STATE = "trainer_state.json"
PREFIXES = ("", "base_model.model.")
_NAME = re.compile(r"checkpoint-(\d+)")


def save_adapters(adapters: Sequence[Adapter], folder: Path, *, resumable: bool) -> None:
    """Writes each adapter; `resumable`, so that `load_adapters` gives the same tensors bit for bit.

    Raises:
        TrainingError: what was written doesn't read back as what the adapter holds.
    """
    for adapter in adapters:
        own = folder_of(adapter, adapters, folder)
        adapter.save(own)
        if resumable:
            state = _plain(adapter.state_dict(training=True))
            if _same(state, _portable(own, state)):
                continue
            write_tensors(own / STATE, state)
            if not _same(state, read_tensors(own / STATE)):
                raise TrainingError(f'"{own / STATE}" doesn\'t hold what was written to it.')


def load_adapters(adapters: Sequence[Adapter], folder: Path) -> None:
    """Puts a checkpoint's tensors into the attached adapters.

    Raises:
        TrainingError: the checkpoint lacks an adapter's tensors.
        FormatError: a file of it is damaged.
    """
    read: list[tuple[Adapter, dict[str, Tensor]]] = []
    for adapter in adapters:
        own = folder_of(adapter, adapters, folder)
        exact = own / STATE
        tensors = (
            read_tensors(exact)
            if exact.exists()
            else _portable(own, adapter.state_dict(training=True))
        )
        if not tensors:
            raise TrainingError(
                f'"{own}" isn\'t a checkpoint of gt.Trainer: it has no tensors for the adapter '
                f'"{adapter.name}" ({STATE} is missing); to go on from a saved adapter without its '
                "optimizer, gt.load it and train."
            )
        read.append((adapter, tensors))
    for adapter, tensors in read:
        adapter.load_state_dict(tensors)


def folder_of(adapter: Adapter, adapters: Sequence[Adapter], folder: Path) -> Path:
    """Returns where an adapter lies in a checkpoint: at its top if it is the only one."""
    return folder if len(adapters) == 1 else folder / adapter.name


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Writes what `read_manifest` reads."""
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Returns a checkpoint's manifest.

    Raises:
        TrainingError: there is none, or it can't be read.
    """
    try:
        return json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        have = "it has no " + MANIFEST if folder.is_dir() else "there is no such folder"
        raise TrainingError(f'"{folder}" isn\'t a checkpoint of gt.Trainer: {have}.') from None
    except (OSError, ValueError) as error:
        raise TrainingError(f'"{folder / MANIFEST}" can\'t be read: {error}.') from error


def check_methods(adapters: Sequence[Adapter], manifest: Mapping[str, Any], folder: Path) -> None:
    """Raises TrainingError, with the reason, unless the checkpoint was made by the same methods."""
    made: dict[str, dict[str, Any]] = dict(manifest["adapters"])
    if len(made) == len(adapters) == 1:
        made = {adapters[0].name: next(iter(made.values()))}
    have = {adapter.name for adapter in adapters}
    if have != set(made):
        raise TrainingError(
            f'the checkpoint "{folder}" is of the adapters {_listed(made)}, and the model trains '
            f"{_listed(have)}; attach and activate the same ones to resume."
        )
    for adapter in adapters:
        now, then = adapter.method.to_dict(), made[adapter.name]
        if now != then:
            raise TrainingError(
                f'the checkpoint "{folder}" was made with other settings of "{adapter.name}": '
                f"{differences(then, now)}; attach the same method to resume, or train into "
                "another folder."
            )


def check_data(now: Mapping[str, Any], manifest: Mapping[str, Any], folder: Path) -> None:
    """Raises TrainingError, with the reason, unless the data come in the order they came in."""
    then = manifest["data"]
    if dict(now) != then:
        raise TrainingError(
            f'the checkpoint "{folder}" was made on other data or in another order: '
            f"{differences(then, now)}; set it back, or pass ignore_data_skip=True to go on with "
            "the weights and the optimizer alone."
        )


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Returns "r was 8 and is 16, ..." for two sets of settings."""
    keys = [key for key in {**then, **now} if then.get(key) != now.get(key)]
    return ", ".join(f"{key} was {then.get(key)!r} and is {now.get(key)!r}" for key in keys)


def last_checkpoint(folder: Path) -> Path | None:
    """Returns the whole checkpoint with the most steps in a folder, or None."""
    return max(_numbered(folder), default=(0, None))[1]


def find_checkpoint(wanted: str | bool | Path, output_dir: str) -> Path:
    """Returns the checkpoint to resume from; True means the last one in `output_dir`.

    Raises:
        TrainingError: there is none.
    """
    if wanted is not True:
        path = Path(str(wanted))
        if not (path / TRAINER_STATE).is_file():
            last = last_checkpoint(path) if path.is_dir() else None
            hint = f' Did you mean "{last}"?' if last else ""
            raise TrainingError(f'"{path}" isn\'t a checkpoint: it has no {TRAINER_STATE}.{hint}')
        return path
    last = last_checkpoint(Path(output_dir))
    if last is None:
        raise TrainingError(f'there is no checkpoint to resume from in "{output_dir}".')
    return last


@contextlib.contextmanager
def whole(
    final: Path, *, writer: bool = True, wait: Callable[[], None] = lambda: None
) -> Iterator[Path]:
    """Yields an empty folder beside `final` that takes its place when the block ends well.

    Args:
        final: the checkpoint's place; what lies there is replaced.
        writer: whether this process moves it (one of several does).
        wait: returns when all processes have called it.
    """
    parent = final.parent / f".{final.name}.partial"
    folder = parent / final.name
    if writer:
        shutil.rmtree(parent, ignore_errors=True)
    wait()  # what one writes, the writer's clearing mustn't take
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        wait()
        if writer:
            sync_tree(folder)
            if not final.exists():
                os.rename(folder, final)
            elif not exchange(folder, final):
                shutil.rmtree(final)
                os.rename(folder, final)
            sync(final.parent)
        wait()
    finally:
        if writer:
            shutil.rmtree(parent, ignore_errors=True)


def _portable(folder: Path, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the state's tensors as the adapter's own file has them, {} where it lacks any."""
    weights = folder / WEIGHTS
    if not weights.exists():
        return {}
    stored = read_tensors(weights)
    found = {
        name: stored[prefix + name]
        for name in state
        for prefix in PREFIXES
        if prefix + name in stored
    }
    return found if found.keys() == state.keys() else {}


def _same(state: Mapping[str, Tensor], read: Mapping[str, Tensor]) -> bool:
    return state.keys() == read.keys() and all(
        tensor.dtype == read[name].dtype and torch.equal(tensor, read[name])
        for name, tensor in state.items()
    )


def _plain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def _numbered(folder: Path) -> Iterator[tuple[int, Path]]:
    for path in folder.iterdir() if folder.is_dir() else ():
        match = _NAME.fullmatch(path.name)
        if match and (path / TRAINER_STATE).is_file():
            yield int(match[1]), path


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f'"{name}"' for name in sorted(names)) or "none"
