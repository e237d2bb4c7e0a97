"""What happens between the Trainer's steps: schedules, the data's epoch, an interruption."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

if TYPE_CHECKING:
    from graftune.training.trainer import TrainerMixin


class Interruption:
    """A Ctrl-C that waits for the step to end; a second one doesn't."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self, number: int, frame: Any) -> None:
        """Notes the first signal and raises KeyboardInterrupt at the second."""
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Takes SIGINT while the block runs, where this is the main thread."""
        self.asked = False
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGINT, self)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


class Steps(TrainerCallback):
    """Moves the methods' schedules on, and ends a run at a step where it can be resumed."""

    def __init__(self, trainer: TrainerMixin) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Restores the loss summed up since it was logged last."""
        self.trainer.restore_loss()

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Tells the order of examples its epoch, which accelerate forgets when it skips batches."""
        self.trainer.set_epoch(int((state.epoch or 0.0) + 1e-6))

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Moves schedules on, while the gradients of the step are still there."""
        for adapter in self.trainer.training_adapters():
            adapter.method.advance(adapter, state.global_step + 1, state.max_steps)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Asks for a checkpoint after an interruption."""
        if self.trainer.interruption.asked:
            control.should_save = True

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Ends an interrupted run once its checkpoint is written."""
        if self.trainer.interruption.asked:
            raise KeyboardInterrupt
