"""Each module's rank and alpha as PEFT's configs say them: the usual, and patterns for others."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from graftune.methods._patterns import matches, value_for


class Ranked(Protocol):
    """A method with ranks and alphas, and patterns for modules that have others."""

    @property
    def r(self) -> int:
        """The usual rank."""
        ...

    @property
    def alpha(self) -> float | None:
        """The usual alpha; None is the rank."""
        ...

    @property
    def rank_pattern(self) -> dict[str, int] | None:
        """Other ranks by pattern."""
        ...

    @property
    def alpha_pattern(self) -> dict[str, float] | None:
        """Other alphas by pattern."""
        ...


def rank_settings(method: Ranked, pairs: Mapping[str, tuple[int, float]]) -> dict[str, Any]:
    """Returns `r`, `alpha`, `rank_pattern` and `alpha_pattern` that mean the given pairs.

    Args:
        method: whose own settings are taken where they mean the same.
        pairs: (rank, alpha) of each module by its whole name.
    """
    given = {
        "r": method.r,
        "alpha": whole_number(method.alpha if method.alpha is not None else method.r),
        "rank_pattern": method.rank_pattern or {},
        "alpha_pattern": method.alpha_pattern or {},
    }
    if all(_means(given, name) == pair for name, pair in pairs.items()):
        return given
    usual = collections.Counter(pairs.values()).most_common(1)[0][0]
    return {
        "r": usual[0],
        "alpha": usual[1],
        "rank_pattern": _exceptions({name: pair[0] for name, pair in pairs.items()}, usual[0]),
        "alpha_pattern": _exceptions({name: pair[1] for name, pair in pairs.items()}, usual[1]),
    }


def whole_number(value: float) -> float:
    """Returns an int where a number is one, up to rounding."""
    return round(value) if abs(value - round(value)) < 1e-9 else value


def used(patterns: Mapping[str, Any], modules: Sequence[str]) -> dict[str, Any] | None:
    """Returns the patterns that name a module, None for none: PEFT lets the others be."""
    found = {
        pattern: value
        for pattern, value in patterns.items()
        if any(matches(pattern, name) for name in modules)
    }
    return found or None


def _means(settings: Mapping[str, Any], name: str) -> tuple[int, float]:
    return (
        value_for(settings["rank_pattern"], name, settings["r"]),
        value_for(settings["alpha_pattern"], name, settings["alpha"]),
    )


def _exceptions(values: Mapping[str, Any], usual: Any) -> dict[str, Any]:
    return {f"^{name}": value for name, value in sorted(values.items()) if value != usual}
