"""Settings by module: a pattern that ends a module's name, and what holds there instead.

The first pattern that matches counts, as in HF PEFT's `rank_pattern` and `alpha_pattern`.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from graftune.errors import SettingsError


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern ends a module's name, at one of its dots."""
    return _ending(pattern).match(name) is not None


@functools.cache  # re's own holds 512, fewer than a large model's patterns when ranks moved
def _ending(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({pattern})$")


def value_for(patterns: Mapping[str, Any] | None, name: str, default: Any = None) -> Any:
    """Returns what the first pattern that ends a module's name says, or the default."""
    return next((v for p, v in (patterns or {}).items() if matches(p, name)), default)


def check_patterns(method: str, field: str, patterns: Mapping[str, float] | None, low: int) -> None:
    """Raises SettingsError for a pattern that can't be one, or a value that isn't from `low` up."""
    for pattern, value in (patterns or {}).items():
        try:
            re.compile(pattern)
        except re.error as error:
            raise SettingsError(
                f'{method}: {field} names "{pattern}", which isn\'t a regular expression: {error}.'
            ) from error
        if not (math.isfinite(value) and value >= low):
            raise SettingsError(
                f'{method}: {field}["{pattern}"] is {value}, expected at least {low}.'
            )


def check_used(
    method: str, field: str, patterns: Mapping[str, Any] | None, names: Sequence[str]
) -> None:
    """Raises SettingsError for a pattern that ends none of the targets' names."""
    for pattern in patterns or {}:
        if not any(matches(pattern, name) for name in names):
            raise SettingsError(
                f'{method}: {field} names "{pattern}", which ends none of the '
                f"{len(names)} targets' names, such as {names[0]}."
            )
