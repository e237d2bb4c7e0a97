"""Runs of our Trainer on a tiny model, and what is compared of two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

import graftune as gt
from graftune.training import training_args
from graftune.training.trainer import Trainer
from tests.training.models import examples, tiny

OWN = {
    "callbacks",
    "eval_dataset",
    "forward",
    "group_by_length",
    "head_lr",
    "loss_chunk",
    "offload_activations",
    "offload_optimizer",
    "on_interrupt",
    "optimizer_cls_and_kwargs",
    "train_dataset",
}


def args(folder: Path, **settings: Any) -> transformers.TrainingArguments:
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "num_train_epochs": 3,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_steps": 4,
        "disable_tqdm": True,
        "warmup_steps": 3,
        "use_cpu": True,
    }
    return training_args(folder, **(defaults | settings))


def trainer(folder: Path, method: Any = None, *, model: Any = None, **settings: Any) -> Trainer:
    own = {name: settings.pop(name) for name in OWN & settings.keys()}
    own.setdefault("train_dataset", examples())
    if model is None:
        model = tiny()
        gt.attach(model, method or gt.LoRA(r=2), name="task", seed=0)
    return Trainer(model=model, args=args(folder, **settings), **own)


def curve(run: Any) -> list[tuple[int, float, float, float]]:
    keys = ("step", "loss", "grad_norm", "learning_rate")
    return [tuple(row[key] for key in keys) for row in run.state.log_history if "loss" in row]


def tensors(run: Any) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in gt.adapters(run.model)["task"].state_dict().items()}


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        assert torch.equal(tensor, other[key]), key
