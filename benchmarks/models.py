"""The same model twice, with our LoRA and with HF PEFT's, and batches for it."""

from __future__ import annotations

import copy
from typing import Any

import torch

import graftune as gt

RANK = 8


def minilm(labels: int = 15) -> Any:
    """Returns MiniLM with a classification head."""
    from graftune.tasks.models import load_base

    names = [f"label {number}" for number in range(labels)]
    return load_base("demo:minilm", "classification", labels=names).model


def smollm2() -> Any:
    """Returns SmolLM2 of 135 M parameters."""
    from graftune.tasks.models import load_base

    return load_base("demo:smollm2", "causal-lm").model


def with_ours(model: Any) -> Any:
    """Returns a copy with our LoRA on all linears of the blocks."""
    model = copy.deepcopy(model)
    gt.attach(model, gt.LoRA(r=RANK), seed=0)
    return model


def with_peft(model: Any, task: str) -> Any:
    """Returns a copy with HF PEFT's LoRA on the same linears."""
    from peft import get_peft_model

    return get_peft_model(copy.deepcopy(model), peft_config(model, task))


def peft_config(model: Any, task: str) -> Any:
    """Returns PEFT's settings of the same LoRA: the linears that ours is on."""
    from peft import LoraConfig

    mine = with_ours(model)
    places = [graft.place for graft in gt.adapters(mine)["default"].grafts]
    targets = sorted({place.module for place in places if hasattr(place, "rows")})
    return LoraConfig(task_type=task, r=RANK, lora_alpha=RANK, target_modules=targets)


def classification_batch(rows: int = 16, tokens: int = 32) -> dict[str, torch.Tensor]:
    """Returns rows of one length, without padding, with labels."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 20000, (rows, tokens), generator=draw)
    labels = torch.randint(0, 15, (rows,), generator=draw)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def language_batch(rows: int = 2, tokens: int = 32) -> dict[str, torch.Tensor]:
    """Returns rows of one length that are their own labels."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 40000, (rows, tokens), generator=draw)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
