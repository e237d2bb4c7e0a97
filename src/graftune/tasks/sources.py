"""What a user may call data: a file, a folder, or a data set of the `datasets` library."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from graftune.errors import DataError
from graftune.tasks.bad_rows import BadRows
from graftune.tasks.tables import (
    Table,
    class_names,
    missing_file_message,
    name_classes,
    read_table,
    readable_endings,
)

SPLIT_NAMES: dict[str, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test", "testing"),
}
"""The names under which each split is found in a folder or data set."""
BadSplits = dict[str, BadRows]
"""What was left out of each split."""


def read_source(spec: str, bad: BadSplits | None = None) -> dict[str, Table]:
    """Returns the splits of a file, a folder, or a data set's name (`owner/name:configuration`).

    A single file or an unnamed split is "train". Rows of files that can't be read are counted in
    `bad`; without it they are errors.

    Raises:
        DataError: There is nothing of that name, or it can't be read.
    """
    path = Path(spec).expanduser()
    if path.is_file():
        return {"train": read_table(path, _of(bad, "train"))}
    if path.is_dir():
        saved = any((path / name).exists() for name in ("dataset_dict.json", "state.json"))
        images = {} if saved else image_folder(path)
        return _saved_dataset(path) if saved else images or _folder(path, bad)
    meant = spec.startswith((".", "/", "~")) or spec.endswith("/")
    if meant or path.suffix.lower() in readable_endings():
        raise DataError(missing_file_message(path))
    return _named_dataset(spec)


def read_split(spec: str, split: str, bad: BadSplits | None = None) -> Table:
    """Returns the one split that a file, folder or data set's name stands for.

    Raises:
        DataError: As `read_source`; or the source holds several splits, but not this one.
    """
    found: BadSplits | None = None if bad is None else {}
    tables = read_source(spec, found)
    name = split if split in tables else next(iter(tables))
    if split not in tables and len(tables) > 1:
        raise DataError(f'"{spec}" holds no {split} split: found {", ".join(tables)}.')
    if bad is not None and found:
        bad[split] = found.get(name, BadRows())
    return tables[name]


def file_hashes(spec: str) -> dict[str, str]:
    """Returns the SHA-256 of a data file, or of each data file of a folder; {} for a name."""
    path = Path(spec).expanduser()
    if path.is_file():
        return {str(path): _hash(path)}
    if path.is_dir() and image_folder(path):
        return {str(path): _hash_of_names(path)}
    if path.is_dir():
        files = sorted(item for item in path.iterdir() if item.is_file())
        return {str(item): _hash(item) for item in files}
    return {}


def image_folder(path: Path) -> dict[str, Table]:
    """Returns the splits of a folder with a folder of images for each label; {} if it is none.

    Those may lie in folders of splits. Every file counts as an image, but for hidden ones.
    """
    inside = sorted(item for item in path.iterdir() if item.is_dir())
    if any(item.is_file() and item.suffix.lower() in readable_endings() for item in path.iterdir()):
        return {}
    splits = {name: item for item in inside if (name := _split_of(item.name)) is not None}
    if "train" not in splits:
        table = _labelled_images(path, path)
        return {"train": table} if table.rows else {}
    tables = {name: _labelled_images(item, path) for name, item in splits.items()}
    return tables if all(table.rows for table in tables.values()) else {}


def _labelled_images(folder: Path, source: Path) -> Table:
    rows = [
        {"image": str(file.relative_to(source)), "label": label.name}
        for label in sorted(folder.iterdir())
        if label.is_dir() and not label.name.startswith(".")
        for file in sorted(label.iterdir())
        if file.is_file() and not file.name.startswith(".")
    ]
    return Table(rows, str(source))


def _hash_of_names(folder: Path) -> str:
    """Returns the SHA-256 of the names and sizes of all files below a folder."""
    files = sorted(item for item in folder.rglob("*") if item.is_file())
    told = "\n".join(f"{item.relative_to(folder)} {item.stat().st_size}" for item in files)
    return hashlib.sha256(told.encode()).hexdigest()


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _folder(path: Path, bad: BadSplits | None) -> dict[str, Table]:
    files = sorted(
        item
        for item in path.iterdir()
        if item.is_file() and item.suffix.lower() in readable_endings()
    )
    if len(files) == 1:
        return {"train": read_table(files[0], _of(bad, "train"))}
    found: dict[str, Path] = {}
    for item in files:
        split = _split_of(item.stem)
        if split is not None and split in found:
            raise DataError(f'"{path}" holds two {split} files: {found[split].name}, {item.name}.')
        if split is not None:
            found[split] = item
    if "train" not in found:
        names = ", ".join(item.name for item in files) or "no data file"
        raise DataError(
            f'"{path}" holds {names}: expected one data file, or one named train and, if you like, '
            f"one named validation and one named test ({', '.join(readable_endings())})."
        )
    return {
        split: read_table(found[split], _of(bad, split)) for split in SPLIT_NAMES if split in found
    }


def _of(bad: BadSplits | None, split: str) -> BadRows | None:
    return None if bad is None else bad.setdefault(split, BadRows())


def _split_of(stem: str) -> str | None:
    word = stem.lower().replace("_", "-").split("-")[0]
    return next((split for split, names in SPLIT_NAMES.items() if word in names), None)


def _saved_dataset(path: Path) -> dict[str, Table]:
    import datasets

    try:
        return _tables(datasets.load_from_disk(str(path)), str(path))
    except (OSError, ValueError) as error:
        raise DataError(f'"{path}" is not a whole `datasets` folder: {error}.') from error


def _named_dataset(spec: str) -> dict[str, Table]:
    import datasets

    name, _, configuration = spec.partition(":")
    try:
        loaded = datasets.load_dataset(name, configuration or None)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f'"{spec}" is neither a file nor a folder here, and no data set of that name could be '
            f"loaded: {str(error).splitlines()[0]}"
        ) from error
    return _tables(loaded, spec)


def _tables(loaded: Any, source: str) -> dict[str, Table]:
    if not isinstance(loaded, Mapping):
        return {"train": _table(loaded, source)}
    tables: dict[str, Table] = {}
    for name, part in loaded.items():
        split = _split_of(str(name))
        if split is not None and split not in tables:
            tables[split] = _table(part, f"{source} {name}")
    if not tables:
        raise DataError(f'"{source}" has no split that is known: found {", ".join(loaded)}.')
    return tables


def _table(dataset: Any, source: str) -> Table:
    found = {column: class_names(feature) for column, feature in dataset.features.items()}
    names = {column: classes for column, classes in found.items() if classes}
    return Table([name_classes(row, names) for row in dataset.to_list()], source)
