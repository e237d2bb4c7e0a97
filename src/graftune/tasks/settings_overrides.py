"""Changes to settings from a command line: `train.lr=1e-3`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

from graftune.errors import SettingsError
from graftune.tasks.settings_yaml import KeyPath, parse_value


def apply_overrides(
    values: Mapping[str, Any], changes: Iterable[tuple[KeyPath, Any]]
) -> dict[str, Any]:
    """Returns nested dictionaries with values put in by their key paths.

    Raises:
        SettingsError: A path goes through something that has no keys.
    """
    out = dict(values)
    for path, value in changes:
        new: Any = value
        for depth in range(len(path) - 1, -1, -1):
            above = _at(out, path[:depth])
            if not isinstance(above, Mapping):
                raise SettingsError(f"--set {'.'.join(path)}: {path[depth - 1]} has no keys.")
            new = {**cast(Mapping[str, Any], above), path[depth]: new}
        out = new
    return out


def _at(values: Any, path: KeyPath) -> Any:
    for index, key in enumerate(path):
        found = cast(Mapping[str, Any], values).get(key) if isinstance(values, Mapping) else values
        if path[: index + 1] == ("method",) and isinstance(found, str):
            found = {"name": found}
        values = {} if found is None else found
    return values


def parse_override(text: str) -> tuple[KeyPath, Any]:
    """Returns the key path and the value of `a.b=value`.

    Raises:
        SettingsError: The text isn't of that form.

    Example:
        >>> parse_override("train.lr=1e-3")
        (('train', 'lr'), 0.001)
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise SettingsError(f'--set "{text}" is not of the form key=value, as in train.lr=1e-3.')
    return tuple(key.strip().split(".")), parse_value(value)
