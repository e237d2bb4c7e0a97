"""TrainingArguments with the settings that suit adapters and waste no time."""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers import TrainingArguments

from graftune.errors import SettingsError, nearest

LOGGING_STEPS = 10


def training_args(output_dir: str = "graftune-out", **settings: Any) -> TrainingArguments:
    """Returns transformers' TrainingArguments; `settings` replace our defaults and theirs.

    Ours: nothing is reported to services, memory is pinned only for a GPU, batches are made in the
    process itself, the loss is logged every 10 steps and never hidden where it isn't finite.

    Raises:
        SettingsError: a setting that TrainingArguments doesn't know, or values it refuses.

    Example:
        >>> training_args("out", learning_rate=1e-3).report_to
        []
    """
    known = [field.name for field in dataclasses.fields(TrainingArguments) if field.init]
    for name in settings:
        if name not in known:
            raise SettingsError(f'there is no training setting "{name}".{nearest(name, known)}')
    try:
        return TrainingArguments(output_dir=str(output_dir), **(_defaults() | settings))
    except (ValueError, TypeError) as error:
        raise SettingsError(f"the training settings don't go together: {error}") from error


def _defaults() -> dict[str, Any]:
    import torch

    return {
        "report_to": "none",
        "dataloader_pin_memory": torch.cuda.is_available(),
        "dataloader_num_workers": 0,
        "logging_steps": LOGGING_STEPS,
        "logging_nan_inf_filter": False,
        "save_only_model": False,
    }
