"""Adapter directories on disk: HF PEFT's wherever PEFT has the method; atomic, never pickled.

adapter_config.json          PEFT's settings, or ours under a type of our own
adapter_model.safetensors    the tensors, under PEFT's names
graftune.json                what PEFT's file has no place for: method, slices, base, counts
README.md                    the card
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graftune.formats.inspecting import Inspection, inspect
    from graftune.formats.loading import load
    from graftune.formats.saving import file_config, file_tensors, save, write_config
    from graftune.formats.servers import Verdict

# `inspect` reads no tensor, so that it needs neither torch nor a model: each home is loaded apart.
_HOMES = {
    "Inspection": "inspecting",
    "Verdict": "servers",
    "file_config": "saving",
    "file_tensors": "saving",
    "inspect": "inspecting",
    "load": "loading",
    "save": "saving",
    "write_config": "saving",
}

__all__ = [
    "Inspection",
    "Verdict",
    "file_config",
    "file_tensors",
    "inspect",
    "load",
    "save",
    "write_config",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
