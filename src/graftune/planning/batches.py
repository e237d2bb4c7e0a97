"""A batch for a model, of the shapes that training gives it; padded, as batches mostly are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graftune.planning.settings import PlanSettings
from graftune.planning.skeletons import Base


def batch_of(base: Base, model: Any, settings: PlanSettings) -> dict[str, Tensor]:
    """Returns what the model's forward takes, with labels; its first row ends in padding."""
    rows = settings.batch_size
    inputs = _inputs(base, model, settings)
    tokens = inputs["input_ids"].shape if "input_ids" in inputs else (rows, 1)
    if base.task in ("seq2seq-lm", "speech-to-text"):
        return {**inputs, "labels": torch.ones(rows, settings.target_length, dtype=torch.long)}
    if base.task == "question-answering":
        marks = torch.zeros(rows, dtype=torch.long)
        return {**inputs, "start_positions": marks, "end_positions": marks.clone()}
    if base.task in ("classification", "image-classification"):
        return {**inputs, "labels": torch.zeros(rows, dtype=torch.long)}
    if base.task == "feature":
        return inputs
    return {**inputs, "labels": torch.zeros(*tokens, dtype=torch.long)}


def _inputs(base: Base, model: Any, settings: PlanSettings) -> dict[str, Tensor]:
    rows, config = settings.batch_size, base.config
    name = getattr(model, "main_input_name", "input_ids")
    if name == "pixel_values":
        own = getattr(config, "vision_config", config)
        size = settings.image_size or getattr(own, "image_size", 224)
        height, width = (size, size) if isinstance(size, int) else size
        return {name: torch.zeros(rows, getattr(own, "num_channels", 3), height, width)}
    if name == "input_features":
        steps = 2 * int(config.max_source_positions)
        return {name: torch.zeros(rows, int(config.num_mel_bins), steps)}
    ids = torch.full((rows, settings.length), 5, dtype=torch.long)
    mask = torch.ones_like(ids)
    if settings.length > 1:
        mask[0, -1] = 0
    return {"input_ids": ids, "attention_mask": mask}
