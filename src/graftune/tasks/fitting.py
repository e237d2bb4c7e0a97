"""The training itself: `gt.Trainer` with a run's settings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PrinterCallback

from graftune import processes
from graftune.tasks import packing
from graftune.tasks.measured import LOWER_IS_BETTER, Score
from graftune.tasks.progress import EachStep, Progress, TimeLimit, history
from graftune.tasks.result import Checker, Watcher
from graftune.tasks.settings import RunSettings
from graftune.tasks.task import Ready, Task
from graftune.training import sharding
from graftune.training.arguments import training_args
from graftune.training.checkpoints import last_checkpoint
from graftune.training.trainer import Trainer
from graftune.training.trunk_cache import cut_of

LOGGED_STEPS = 100
"""About how often in a run the loss is logged."""
_SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}

Features = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Fitted:
    """What training gives besides the weights."""

    history: list[dict[str, Any]]
    """The logged rows."""
    validation: dict[str, float]
    """The validation metrics of the weights that the run ends with; {} without validation."""
    said: tuple[str, ...] = ()
    """What the trunk cache saved and whether the loss was in pieces, in a sentence each."""


def total_steps(settings: RunSettings, rows: int) -> int:
    """Returns the optimiser steps of a run over `rows` training examples."""
    train = settings.train
    if train.steps is not None:
        return train.steps
    batches = math.ceil(rows / (train.batch_size or 1))
    return math.ceil(math.ceil(batches / train.accumulation) * (train.epochs or 1))


def fit(
    ready: Ready,
    task: Task,
    settings: RunSettings,
    train: Features,
    validation: Features,
    *,
    score: Score,
    run_dir: Path,
    watcher: Watcher,
    plan: dict[str, Any],
    resume: bool,
    trunk: Path | None = None,
) -> Fitted:
    """Trains what is attached to the model, and leaves the best or the last weights in it.

    `trunk` is a folder for the trunk's states that stays; None for one that ends with the run.

    Raises:
        TrainingError: The loss is no longer finite, or a checkpoint doesn't fit the run.
        KeyboardInterrupt: After Ctrl-C, once a checkpoint is written.
    """
    folder = run_dir / "checkpoints"
    cached = _caches_trunk(ready, task, settings, len(train))
    trainer = Trainer(
        model=ready.model,
        args=training_args(str(folder), **_arguments(settings, len(train), bool(validation))),
        data_collator=packing.collator(task.collate(ready)),
        forward=task.forward if task.has_own_forward else None,
        train_dataset=train,
        eval_dataset=validation or None,
        compute_metrics=_scores(score),
        preprocess_logits_for_metrics=_summaries(task),
        group_by_length=settings.train.group_by_length,
        head_lr=settings.train.head_lr,
        trunk_cache=(trunk or True) if cached else False,
        loss_chunk=settings.train.loss_chunk,
        offload_activations=settings.train.offload_activations,
        offload_optimizer=settings.train.offload_optimizer,
        callbacks=_callbacks(settings, watcher, run_dir, plan),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=last_checkpoint(folder) if resume else None)
    found = _validated(trainer, settings) if validation else {}
    said = tuple(one for one in (trainer.trunk_summary, trainer.chunk_summary) if one is not None)
    return Fitted(history(trainer.state.log_history), found, said)


def _caches_trunk(ready: Ready, task: Task, settings: RunSettings, rows: int) -> bool:
    """Whether to keep what the base computes: as asked, or where it is read again and exact."""
    train = settings.train
    if train.packing or task.reads_images:
        return False
    if train.trunk_cache is not None:
        return train.trunk_cache
    if sharding.asked() is not None:
        return False
    read = total_steps(settings, rows) * (train.batch_size or 1) * train.accumulation
    is_still = settings.train.drop == 0 and not task.has_own_forward
    return read > rows and is_still and not isinstance(cut_of(ready.model), str)


def _arguments(settings: RunSettings, rows: int, validated: bool) -> dict[str, Any]:
    train = settings.train
    steps = total_steps(settings, rows)
    metric = train.metric or "loss"
    share = (train.batch_size or 1) // processes.count()
    return {
        "num_train_epochs": train.epochs or 1.0,
        "max_steps": train.steps or -1,
        "per_device_train_batch_size": share,
        "per_device_eval_batch_size": 2 * share,
        "gradient_accumulation_steps": train.accumulation,
        "learning_rate": train.lr,
        "lr_scheduler_type": _SCHEDULES[train.schedule],
        "warmup_steps": round(train.warmup * steps),
        "weight_decay": train.weight_decay,
        "max_grad_norm": train.max_grad_norm,
        "seed": train.seed,
        "logging_steps": max(1, steps // LOGGED_STEPS),
        "eval_strategy": _when(train.eval_every) if validated else "no",
        "eval_steps": train.eval_every or None,
        "save_strategy": _when(train.eval_every if train.save_every is None else train.save_every),
        "save_steps": train.save_every or train.eval_every or 500,
        "save_total_limit": train.keep,
        "load_best_model_at_end": train.select == "best",
        "metric_for_best_model": metric,
        "greater_is_better": metric not in LOWER_IS_BETTER,
        "bf16": train.precision == "bfloat16",
        "use_cpu": _is_told(train.precision),
        "fp16": train.precision == "float16",
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "disable_tqdm": True,
        "report_to": list(train.report_to) or "none",
        "run_name": settings.run_name,
        **({"optim": train.optimizer} if train.optimizer else {}),
        **({"gradient_checkpointing": True} if train.gradient_checkpointing else {}),
    }


def _is_told(precision: str) -> bool:
    """Whether the Trainer must be told that it computes on a CPU, or it refuses, or goes alone."""
    from accelerate.utils import is_cuda_available

    several = processes.count() > 1
    return (several or precision == "bfloat16") and not is_cuda_available()


def _when(every: int | None) -> str:
    return "epoch" if every is None else "steps" if every else "no"


def _callbacks(
    settings: RunSettings, watcher: Watcher, run_dir: Path, plan: dict[str, Any]
) -> list[Any]:
    from transformers import EarlyStoppingCallback

    callbacks: list[Any] = [Progress(watcher, run_dir / "metrics.jsonl", plan)]
    if isinstance(watcher, Checker):
        callbacks.append(EachStep(watcher))
    if settings.train.seconds is not None:
        callbacks.append(TimeLimit(settings.train.seconds))
    if settings.train.early_stop is not None:
        callbacks.append(EarlyStoppingCallback(settings.train.early_stop))
    return callbacks


def _scores(score: Score) -> Any:
    def compute(prediction: Any) -> dict[str, float]:
        return score(prediction.predictions, prediction.label_ids)

    return compute


def _summaries(task: Task) -> Any:
    def summarise(logits: Any, labels: Any) -> Any:
        return task.summarise(logits[0] if isinstance(logits, tuple) else logits, labels)

    return summarise


def _validated(trainer: Trainer, settings: RunSettings) -> dict[str, float]:
    """Returns the metrics of the weights that the model has now, computed only if they aren't."""
    best = settings.train.select == "best"
    step = trainer.state.best_global_step if best else trainer.state.global_step
    rows = [row for row in history(trainer.state.log_history) if "eval_loss" in row]
    row = next((row for row in reversed(rows) if row["step"] == step), None)
    found = row or trainer.evaluate()
    untold = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "eval_model")
    return {
        key.removeprefix("eval_"): float(value)
        for key, value in found.items()
        if key.startswith("eval_") and not key.startswith(untold)
    }
