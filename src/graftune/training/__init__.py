"""Training: the Trainer, batches by length, checkpoints that resume exactly, peak memory.

Everything here is loaded when first used, since it stands on torch and transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graftune.training.arguments import training_args as training_args
    from graftune.training.lengths import LengthBatches as LengthBatches
    from graftune.training.lengths import PadToLongest as PadToLongest
    from graftune.training.memory import peak_memory_bytes as peak_memory_bytes
    from graftune.training.memory import reset_peak_memory as reset_peak_memory
    from graftune.training.steps import AdapterCallback as AdapterCallback
    from graftune.training.trainer import Trainer as Trainer
    from graftune.training.trainer import TrainerMixin as TrainerMixin

_HOMES = {
    "AdapterCallback": "steps",
    "LengthBatches": "lengths",
    "PadToLongest": "lengths",
    "Trainer": "trainer",
    "TrainerMixin": "trainer",
    "peak_memory_bytes": "memory",
    "reset_peak_memory": "memory",
    "training_args": "arguments",
}

__all__ = [
    "AdapterCallback",
    "LengthBatches",
    "PadToLongest",
    "Trainer",
    "TrainerMixin",
    "peak_memory_bytes",
    "reset_peak_memory",
    "training_args",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
