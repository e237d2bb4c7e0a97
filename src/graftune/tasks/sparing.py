"""The settings of a run that spare memory, checked before anything is loaded."""

from __future__ import annotations

import tempfile

from graftune.errors import SettingsError, TrainingError
from graftune.tasks.settings import RunSettings
from graftune.tasks.task import Task

LANGUAGE_TASKS = ("causal-lm", "seq2seq-lm", "lm")


def check(settings: RunSettings, task: Task) -> None:
    """Checks what is to spare memory against the task and the device.

    Raises:
        SettingsError: The loss of the task has no logits of words, or is its own; its examples
            can't be packed; there is no GPU to offload from; or the optimiser can't run here.
    """
    train = settings.train
    own_loss = task.has_own_forward or task.model_task not in LANGUAGE_TASKS
    if train.loss_chunk is not None and own_loss:
        raise SettingsError(
            f"train.loss_chunk is {train.loss_chunk}, but the loss of {task.name} isn't that of "
            "each word among all: leave it out; instruct has such a loss."
        )
    if train.packing and not task.packs:
        raise SettingsError(
            f"train.packing is true, but {task.name} can't put several examples into one row: "
            "leave it out; instruct can."
        )
    if train.packing and train.trunk_cache:
        raise SettingsError(
            "train.packing and train.trunk_cache are both true, and rows that hold several "
            "conversations have no trunk cache: leave one of them out."
        )
    if not (train.offload_activations or train.offload_optimizer or train.optimizer):
        return
    from graftune.training.arguments import training_args
    from graftune.training.offloading import Offloading
    from graftune.training.optimizers import check_optimizer

    with tempfile.TemporaryDirectory() as folder:
        args = training_args(folder, **({"optim": train.optimizer} if train.optimizer else {}))
        try:
            Offloading(train.offload_activations, train.offload_optimizer).check(args)
            check_optimizer(args)
        except TrainingError as error:
            raise SettingsError(f"train: {error}") from error
