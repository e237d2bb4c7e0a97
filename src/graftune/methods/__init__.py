"""What acts at the sites: one file per method, with its settings, equation, initial values, counts.

A file in this package registers its method by the class decorator `register`; another package's
does so through the entry point group "graftune.methods". No list names them.

The package can be called: `graftune.methods()` is `graftune.methods.methods()`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil
import sys
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from graftune.methods.base import Method


@cache
def _import_all() -> None:
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    for entry in importlib.metadata.entry_points(group="graftune.methods"):
        entry.load()


def methods() -> dict[str, type[Method]]:
    """Returns every method by name: this package's, other packages', and the user's own."""
    from graftune.methods.base import registered

    _import_all()
    return registered()


class _Callable(ModuleType):
    """Lets the package be called as the function it is named after."""

    def __call__(self) -> dict[str, type[Method]]:
        """Returns every method by name."""
        return methods()


sys.modules[__name__].__class__ = _Callable
