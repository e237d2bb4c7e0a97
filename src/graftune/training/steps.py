"""What happens between the Trainer's steps: schedules, the data's epoch, an interruption."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from graftune import processes
from graftune.adapter import Adapter, adapters
from graftune.errors import TrainingError

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


def trainable(model: nn.Module) -> list[Adapter]:
    """Returns a model's adapters that get gradients."""
    found = adapters(model).values()
    return [a for a in found if any(p.requires_grad for p in a.parameters())]


def penalty_of(found: list[Adapter]) -> Tensor | None:
    """Returns the sum of the methods' penalties, None where there is none."""
    parts = [part for a in found if (part := a.method.penalty(a)) is not None]
    return sum(parts[1:], parts[0]) if parts else None


class Schedules(TrainerCallback):
    """Tells the methods how long a run is, each of its steps, and that it has ended."""

    def adapters(self, model: Any) -> list[Adapter]:
        """Returns the adapters that train."""
        return trainable(model)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Tells the methods how many steps the run has.

        Raises:
            SettingsError: a schedule doesn't fit so many steps.
        """
        for adapter in self.adapters(given.get("model")):
            adapter.begin(state.max_steps)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Moves the schedules on, while the gradients of the step are still there."""
        for adapter in self.adapters(given.get("model")):
            adapter.advance(state.global_step + 1)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Brings the adapters into their last form."""
        for adapter in self.adapters(given.get("model")):
            adapter.finish()


class AdapterCallback(Schedules):
    """What lets a Trainer that isn't gt.Trainer train methods with a penalty or a schedule.

        transformers.Trainer(model, args, callbacks=[gt.AdapterCallback()], ...)

    The penalty's gradient is put in place before a step's first batch, so it is added to the
    loss's, and clipped with it; the reported loss is without the penalty.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """See `Schedules.on_train_begin`.

        Raises:
            TrainingError: gradients are scaled (fp16), which only gt.Trainer can do with a penalty.
        """
        super().on_train_begin(args, state, control, **given)
        for adapter in self.adapters(given.get("model")):
            if args.fp16 and adapter.method.needs_steps(adapter):
                raise TrainingError(
                    f"{adapter.method.name} with fp16 needs gt.Trainer: a callback can't scale its "
                    "penalty as the loss is scaled; take bf16, or gt.Trainer."
                )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Puts the penalty's gradient in place."""
        penalty = penalty_of(self.adapters(given.get("model")))
        if penalty is not None:
            penalty.backward()


class Steps(Schedules):
    """Moves the methods' schedules on, and ends a run at a step where it can be resumed."""

    def __init__(self, trainer: TrainerMixin) -> None:
        self.trainer = trainer

    def adapters(self, model: Any) -> list[Adapter]:
        """See `Schedules.adapters`: also where FSDP wraps the model."""
        return self.trainer.training_adapters()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Tells the methods how long the run is; restores the loss summed up since its last log."""
        super().on_train_begin(args, state, control, **given)
        self.trainer.restore_loss()

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Tells the order of examples its epoch, which accelerate forgets when it skips batches."""
        self.trainer.set_epoch(int((state.epoch or 0.0) + 1e-6))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Brings the adapters into their last form, which may need a new optimizer."""
        self.trainer.finish_adapters()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Asks for a checkpoint after an interruption."""
        interruption = self.trainer.interruption
        if args.world_size > 1:  # all must stop at the same step, whenever each heard of it
            interruption.asked = processes.any_of(interruption.asked)
        if interruption.asked:
            control.should_save = True

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Ends an interrupted run once its checkpoint is written."""
        if self.trainer.interruption.asked:
            raise KeyboardInterrupt
