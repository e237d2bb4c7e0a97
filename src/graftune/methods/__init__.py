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
    from importlib.metadata import EntryPoint

    from graftune.methods.base import Method


@cache
def _import_own() -> None:
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")


@cache
def _others() -> list[EntryPoint]:
    """Returns the entry points that are still to be loaded; what is loaded is taken out."""
    return list(importlib.metadata.entry_points(group="graftune.methods"))


def _import_others() -> None:
    """Registers other packages' methods, but those of a module that is being imported just now.

    Such a module asks for a method of ours, as a base class; its own turn comes with a later call.
    """
    from graftune.methods.base import register

    for entry in list(_others()):
        spec = getattr(sys.modules.get(entry.module), "__spec__", None)
        if entry in _others() and not getattr(spec, "_initializing", False):
            register(entry.load())
            _others().remove(entry)


def methods() -> dict[str, type[Method]]:
    """Returns every method by name: this package's, other packages', and the user's own."""
    from graftune.methods.base import registered

    _import_own()
    _import_others()
    return registered()


class _Callable(ModuleType):
    """Lets the package be called as the function it is named after."""

    def __call__(self) -> dict[str, type[Method]]:
        """Returns every method by name."""
        return methods()


sys.modules[__name__].__class__ = _Callable
