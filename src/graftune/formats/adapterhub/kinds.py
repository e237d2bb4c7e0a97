"""The kinds of adapters that AdapterHub writes, each read by a module of its own with a `KIND`."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache
from typing import Any

from graftune.errors import FormatError
from graftune.formats import adapterhub
from graftune.formats.adapterhub.base import Kind


def kind_of(settings: Mapping[str, Any], where: str, wrote: str) -> Kind:
    """Returns what reads some settings.

    Raises:
        FormatError: nothing does; the message lists what is read.
    """
    for kind in kinds():
        if kind.reads(settings):
            return kind
    raise FormatError(
        f'{where} is of kind "{settings.get("architecture")}", written by {wrote}; of its kinds '
        f"this version reads {', '.join(kind.name for kind in kinds())}."
    )


@cache
def kinds() -> tuple[Kind, ...]:
    """Returns what reads one kind of settings each."""
    found = [
        importlib.import_module(f"{adapterhub.__name__}.{module.name}")
        for module in pkgutil.iter_modules(adapterhub.__path__)
    ]
    return tuple(module.KIND for module in found if hasattr(module, "KIND"))
