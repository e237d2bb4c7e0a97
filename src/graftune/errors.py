"""All exceptions of graftune.

    GraftuneError
    ├── AnatomyError       a model whose parts can't be found, or a target that names none of them
    ├── SettingsError      a setting that is unknown or out of range (also a ValueError)
    ├── AdapterError       a name, an order of calls or a composition that can't be
    ├── FormatError        a directory or file that isn't what it should be
    │   └── BaseMismatchError   an adapter made for another base model
    ├── DataError          rows, columns or labels that can't be trained or predicted on
    └── TrainingError      a run that can't go on: a loss that isn't finite, a wrong checkpoint

A message is one sentence: what was wrong, the value seen, what was expected, how to mend it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class GraftuneError(Exception):
    """The base of everything graftune raises on purpose."""


class AnatomyError(GraftuneError):
    """A model's part can't be found, or a target names none."""


class SettingsError(GraftuneError, ValueError):
    """A setting is unknown, of the wrong type or out of range."""


class AdapterError(GraftuneError):
    """An adapter's name, state or composition doesn't allow the call."""


class FormatError(GraftuneError):
    """A directory or file isn't what it should be."""


class BaseMismatchError(FormatError):
    """An adapter was made for another base model."""


class DataError(GraftuneError):
    """Rows, columns or labels can't be trained or predicted on."""


class TrainingError(GraftuneError):
    """A training run can't go on."""


def nearest(word: str, choices: Iterable[str]) -> str:
    """Returns ' Did you mean "x"?' for the nearest of `choices`, or '' when none is near.

    Example:
        >>> nearest("quary", ["query", "key"])
        ' Did you mean "query"?'
    """
    lower = {str(choice).lower(): str(choice) for choice in choices}
    found = difflib.get_close_matches(word.lower(), list(lower), n=1, cutoff=0.6)
    return f' Did you mean "{lower[found[0]]}"?' if found else ""
