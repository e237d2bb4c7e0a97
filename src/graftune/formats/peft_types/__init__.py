"""The methods that HF PEFT has too, one file each: its settings and names of tensors, and ours.

A file defines `TYPE`, a `PeftType`; no list names the files.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import TYPE_CHECKING

from graftune.errors import FormatError
from graftune.formats.peft_types.base import PeftType
from graftune.methods._gate import Gate

if TYPE_CHECKING:
    from graftune.adapter import Adapter


@cache
def _types() -> dict[str, PeftType]:
    modules = [
        importlib.import_module(f"{__name__}.{found.name}")
        for found in pkgutil.iter_modules(__path__)
        if found.name != "base"
    ]
    return {module.TYPE.name: module.TYPE for module in modules}


def reader(name: str, where: str) -> PeftType:
    """Returns what reads a `peft_type`.

    Raises:
        FormatError: none does; the message lists those that are read.
    """
    found = _types().get(name)
    if found is None:
        raise FormatError(
            f"{where} is of type {name}, written by HF PEFT; of its types this version reads "
            f"{', '.join(sorted(_types()))}."
        )
    return found


def writer(adapter: Adapter) -> PeftType | None:
    """Returns what writes an adapter so that PEFT loads it; None where PEFT can't compute it."""
    for kind in _types().values():
        if adapter.method.name in (kind.method, *kind.also):
            return None if obstacle(adapter) else kind
    return None


def obstacle(adapter: Adapter) -> str:
    """Returns why PEFT can't compute an adapter, in words; "" where it can."""
    if any(isinstance(part, Gate) for graft in adapter.grafts for part in graft.delta.children()):
        return "HF PEFT has no gates"
    for kind in _types().values():
        if adapter.method.name in (kind.method, *kind.also):
            return kind.obstacle(adapter) or ""
    return f"HF PEFT has no {adapter.method.name}"
