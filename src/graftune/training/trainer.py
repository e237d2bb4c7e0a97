"""transformers' Trainer for models with adapters.

What it adds: checkpoints that hold the adapters only, whole or not there; a resumed run gives the
loss curve of the uninterrupted one bit for bit; batches of like length; the methods' penalties,
schedules and learning rates; a loss that isn't finite stops the run and names the module; Ctrl-C
ends it at a checkpoint.

    class MyTrainer(TrainerMixin, SFTTrainer): ...     the same for another library's Trainer
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, nn
from transformers.trainer_utils import rotate_checkpoints

from graftune.adapter import Adapter
from graftune.errors import TrainingError
from graftune.formats import saving
from graftune.training import checkpoints, groups, sharding
from graftune.training.arguments import training_args
from graftune.training.chunked_loss import LossChunks
from graftune.training.counted import reads_count
from graftune.training.diagnosis import first_nonfinite, nonfinite_gradient
from graftune.training.lengths import LengthBatches, PadToLongest, token_lengths
from graftune.training.offloading import Offloading, StateElsewhere
from graftune.training.optimizers import check_optimizer
from graftune.training.steps import Interruption, Steps, penalty_of, trainable
from graftune.training.trunk_cache import Trunk

_Base = transformers.Trainer if TYPE_CHECKING else object
_BY_LENGTH = ("random", "group_by_length")


class TrainerMixin(_Base):
    """What graftune adds to a Trainer; stands before it among the bases of a class."""

    def __init__(
        self,
        model: Any = None,
        args: transformers.TrainingArguments | None = None,
        data_collator: Any = None,
        *rest: Any,
        group_by_length: bool = True,
        on_interrupt: Callable[[Path | None], None] | None = None,
        forward: Callable[[nn.Module, Any], Any] | None = None,
        head_lr: float | None = None,
        trunk_cache: str | Path | bool | None = None,
        loss_chunk: int | None = None,
        offload_activations: bool = False,
        offload_optimizer: bool = False,
        **settings: Any,
    ) -> None:
        """Takes what the Trainer takes, and eight settings more.

        Args:
            model: a model with adapters attached (or without: then it trains what it would).
            args: the Trainer's; `training_args()` where missing.
            data_collator: pads to the longest of the batch, where missing.
            rest: the Trainer's further settings, in its order.
            group_by_length: batches of examples of like length, where they have `input_ids`.
            on_interrupt: called after Ctrl-C with the checkpoint to resume from, or None.
            forward: gives a batch's outputs, among them "loss", a mean over its examples; else the
                model itself does.
            head_lr: learning rate of heads that train with the adapters; None: `learning_rate`.
            trunk_cache: a folder to keep what the model computes below what trains, which later
                epochs are fed with; dropout below is off. True: one that goes when training ends.
            loss_chunk: tokens of which a language model computes logits and loss at once, in
                training; None: all.
            offload_activations: what a pass saves for its backward waits in the host's memory.
            offload_optimizer: so does the optimizer's state between its steps.
            settings: the Trainer's further settings, by name.
        """
        self.trunk_cache, self._trunk = trunk_cache, Trunk()
        self._chunks = LossChunks(loss_chunk)
        self._offloading = Offloading(offload_activations, offload_optimizer)
        self.group_by_length = group_by_length
        self.on_interrupt = on_interrupt
        self.forward, self.head_lr = forward, head_lr
        if forward is not None:
            self.loss_is_scaled_for_ga = False
        self.interruption = Interruption()
        self._order: LengthBatches | None = None
        self._folder: Path | None = None
        self._unlogged: tuple[float, int] | None = None
        self._flops_per_token: int | None = None
        self._counts_known = False
        args = training_args("tmp_trainer") if args is None else args
        if data_collator is None and settings.get("processing_class") is None and not rest:
            data_collator = _padding(model, settings.get("train_dataset"))
        self._chunks.check(model, args, forward)
        self._offloading.check(args)
        check_optimizer(args)
        super().__init__(model, args, data_collator, *rest, **settings)
        self.sharded_by = sharding.kind_of(self)
        self.add_callback(Steps(self))

    @property
    def trunk_summary(self) -> str | None:
        """What the trunk cache saved in the last training, in a sentence; None without one."""
        return self._trunk.summary

    @property
    def chunk_summary(self) -> str | None:
        """Whether the loss is computed in pieces, in a sentence; None if nobody asked."""
        return self._chunks.summary

    def training_adapters(self) -> list[Adapter]:
        """Returns the attached adapters that train."""
        return trainable(_unwrapped(self))

    def finish_adapters(self) -> None:
        """Brings the trained adapters into their last form; a new run makes a new optimizer."""
        before = {id(p) for a in self.training_adapters() for p in a.parameters()}
        for adapter in self.training_adapters():
            adapter.finish()
        if {id(p) for a in self.training_adapters() for p in a.parameters()} != before:
            self.optimizer = self.lr_scheduler = None

    def train(self, resume_from_checkpoint: Any = None, *rest: Any, **settings: Any) -> Any:
        """Trains; True, or a folder, resumes from a checkpoint.

        Raises:
            TrainingError: there is no checkpoint to resume from, it was made by other settings, or
                the loss is no longer finite.
            KeyboardInterrupt: after Ctrl-C, once the step is done and its checkpoint written; a
                second Ctrl-C doesn't wait.
        """
        if resume_from_checkpoint not in (None, False):
            found = checkpoints.find_checkpoint(resume_from_checkpoint, self.args.output_dir or ".")
            resume_from_checkpoint = str(found)
        try:
            self._check_processes()
            asked, folder = self.trunk_cache, self.args.output_dir
            kept = self._trunk.kept_for(_unwrapped(self), asked, folder, self.forward)
            with kept, self.interruption.listening():
                result = super().train(resume_from_checkpoint, *rest, **settings)
            if self.interruption.asked:
                raise KeyboardInterrupt
            return result
        except KeyboardInterrupt as interrupt:
            kept = checkpoints.last_checkpoint(Path(self.args.output_dir or "."))
            interrupt.add_note(_how_to_go_on(kept))
            if self.on_interrupt is not None:
                self.on_interrupt(kept)
            raise

    def _check_processes(self) -> None:
        """Checks that what trains, and how, goes with several processes."""
        if self.sharded_by is None:
            return
        if self.trunk_cache:
            raise TrainingError(
                f"trunk_cache passes over blocks that {self.sharded_by} gathers in all processes "
                "together: leave one of them out."
            )
        if self._chunks.tokens is not None and self.sharded_by == "FSDP2":
            raise TrainingError(
                "loss_chunk runs the head again inside the backward pass, where FSDP2 has taken "
                "its weights apart: leave it out, or shard with ZeRO-3."
            )
        sharding.check(self.sharded_by, _unwrapped(self), self.training_adapters())

    def training_step(self, model: nn.Module, inputs: Any, *rest: Any, **settings: Any) -> Tensor:
        """Returns the detached loss of a batch after its backward pass.

        Raises:
            TrainingError: it isn't finite; the first module that isn't is named.
        """
        loss = super().training_step(model, inputs, *rest, **settings)
        if not math.isfinite(loss.item()):
            batch = self._prepare_inputs(dict(inputs))
            cause = first_nonfinite(_unwrapped(self), batch, self.forward)
            raise self._not_finite(f"the loss is {loss.item()}", cause)
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Returns the model's loss plus the methods' penalties in training (with the outputs)."""
        result: Any
        inner = _unwrapped(self)
        if self.forward is None:
            self._learn_what_counts(inputs, num_items_in_batch)
            loss = partial(super().compute_loss, model, num_items_in_batch=num_items_in_batch)
            self._chunks.try_once(inner, inputs, loss)
            with (
                self._trunk.passing(inputs),
                self._chunks.passing(inner),
                self._offloading.passing(inner),
            ):
                result = loss(inputs, return_outputs)
        else:
            with self._offloading.passing(inner):
                outputs = self.forward(model, inputs)
            result = (outputs["loss"], outputs) if return_outputs else outputs["loss"]
        penalty = penalty_of(self.training_adapters()) if model.training else None
        if penalty is None:
            return result
        if self._divided_by_the_model(num_items_in_batch):
            penalty = penalty / self.current_gradient_accumulation_steps
        if return_outputs:
            return result[0] + penalty, result[1]
        return result + penalty

    def _learn_what_counts(self, inputs: Any, items: Any) -> None:
        """Takes a loss for what it is, a mean over its batch, where the model counts no items."""
        if self._counts_known or items is None or not self.model_accepts_loss_kwargs:
            return
        self._counts_known = True
        several = self.args.world_size > 1 or self.args.gradient_accumulation_steps > 1
        if several and self.compute_loss_func is None and "labels" in inputs:
            self.model_accepts_loss_kwargs = reads_count(_unwrapped(self), inputs)

    def _divided_by_the_model(self, items: Any) -> bool:
        """Whether the loss is normalised over the accumulated batches, not by training_step."""
        if self.loss_is_scaled_for_ga is not None:
            return self.loss_is_scaled_for_ga
        return (self.model_accepts_loss_kwargs and items is not None) or bool(
            self.compute_loss_func
        )

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        scaled = getattr(self.accelerator, "scaler", None) is not None
        if norm is not None and not scaled and not math.isfinite(float(norm)):
            name = nonfinite_gradient(_unwrapped(self))
            cause = f"{name} is the first parameter whose gradient isn't finite"
            raise self._not_finite(f"the gradient's norm is {float(norm)}", cause)
        return norm

    def _not_finite(self, what: str, cause: str) -> TrainingError:
        kept = checkpoints.last_checkpoint(Path(self.args.output_dir or "."))
        return TrainingError(
            f"training stopped at step {self.state.global_step + 1}: {what}; {cause}. Lower the "
            f"learning rate (now {self._get_learning_rate():g}) or look at the batch"
            + (f'; the last checkpoint is "{kept}".' if kept else ".")
        )

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Makes the optimizer, with the learning rates that methods ask for.

        Raises:
            TrainingError: the optimizer makes its own groups, and a method needs some; or heads
                have a learning rate, and none trains.
        """
        is_new = self.optimizer is None
        made = self._made_optimizer(self.model if model is None else model)
        if is_new and self._offloading.optimizer:
            StateElsewhere(made)
        return made

    def _made_optimizer(self, model: Any) -> torch.optim.Optimizer:
        lr = self.args.learning_rate
        adapters = self.training_adapters()
        asks = [a.method.name for a in adapters if a.method.param_groups(a, lr)]
        if self.head_lr is not None:
            asks.append("head_lr")
            if not groups.trained_heads(adapters):
                raise TrainingError(f"head_lr is {self.head_lr:g}, but no head trains.")
        if self.optimizer is not None or not asks:
            return super().create_optimizer(model)
        given = self.optimizer_cls_and_kwargs
        kind, options = given or self.get_optimizer_cls_and_kwargs(self.args, model)
        if not isinstance(kind, type) or {"params", "model", "optimizer_dict"} & options.keys():
            raise TrainingError(
                f"{asks[0]} sets its own learning rates, which the optimizer "
                f'"{self.args.optim}" can\'t take; use optim="adamw_torch".'
            )
        own = groups.parameter_groups(
            model, adapters, lr=lr, weight_decay=self.args.weight_decay, head_lr=self.head_lr
        )
        self.optimizer = kind(own, **options)
        return self.optimizer

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Returns the parameters that weight decay is for: matrices, not biases, norms or gates."""
        return [name for name, p in model.named_parameters() if groups.decays(p)]

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        grafts = [graft for adapter in self.training_adapters() for graft in adapter.grafts]
        if any(getattr(graft.delta, "tasks", 0) for graft in grafts):
            self._signature_columns = list({*(self._signature_columns or ()), "task_ids"})

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        wanted = self.group_by_length and self.args.train_sampling_strategy in _BY_LENGTH
        lengths = token_lengths(dataset) if wanted else None
        if lengths is None:
            self._order = None
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        together = self._train_batch_size * self.args.world_size  # each process takes its part
        self._order = LengthBatches(lengths, together, seed=seed)
        return self._order

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch whose order of examples comes next."""
        if self._order is not None:
            self._order.set_epoch(epoch)

    def floating_point_ops(self, inputs: Any) -> int:
        """Returns the operations of a batch; the model is counted once, not at each step."""
        if self._flops_per_token is None:
            count = getattr(self.model, "num_parameters", None)
            self._flops_per_token = 6 * count(exclude_embeddings=True) if count else 0
        main = inputs.get(getattr(self.model, "main_input_name", "input_ids"))
        return 0 if main is None else self._flops_per_token * main.numel()

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if not self.training_adapters() or self.args.push_to_hub:
            super()._save_checkpoint(model, trial)
            return
        run = Path(super()._get_output_dir(trial))
        final = run / f"checkpoint-{self.state.global_step}"
        wait = self.accelerator.wait_for_everyone
        with checkpoints.whole(final, writer=self.args.should_save, wait=wait) as folder:
            self._folder = folder.parent
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._folder = None
            self._complete(folder, final)
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            rotate_checkpoints(str(run), self.args.save_total_limit, best, use_mtime=True)

    def _complete(self, folder: Path, final: Path) -> None:
        """Writes what a checkpoint needs besides the Trainer's files, which name their place."""
        is_best = self.state.best_model_checkpoint == str(folder)
        if is_best:  # in every process, each of which reads it at the end
            self.state.best_model_checkpoint = str(final)
        if not self.args.should_save:
            return
        if is_best:
            self.state.save_to_json(str(folder / checkpoints.TRAINER_STATE))
        checkpoints.write_manifest(folder, self._manifest())

    def _manifest(self) -> dict[str, Any]:
        made = {adapter.name: adapter.method.to_dict() for adapter in self.training_adapters()}
        unlogged = {"loss": self._tr_loss.item(), "step": self._globalstep_last_logged}
        return {
            "format": 1,
            "adapters": made,
            "data": self._data_order(),
            "unlogged": unlogged,
            "processes": self.args.world_size,
        }

    def _data_order(self) -> dict[str, Any]:
        dataset: Any = self.train_dataset
        args = self.args
        return {
            "examples": len(dataset) if hasattr(dataset, "__len__") else None,
            "batch size": self._train_batch_size * args.world_size,
            "gradient accumulation": args.gradient_accumulation_steps,
            "data seed": args.seed if args.data_seed is None else args.data_seed,
            "order": "by length" if self._order is not None else str(args.train_sampling_strategy),
        }

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._folder is None else str(self._folder)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the adapters that train; every process calls it, and the first one writes."""
        found = self.training_adapters()
        if not found or self.sharded_by is None:
            super().save_model(output_dir, _internal_call)
            return
        with contextlib.ExitStack() as whole:
            for adapter in found:
                whole.enter_context(saving.whole(adapter))
            self._save(output_dir)
        self.accelerator.wait_for_everyone()

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> Any:
        if self.sharded_by != "ZeRO-3" or not self.training_adapters():
            return super()._prepare_for_training(
                max_steps, train_dataloader, resume_from_checkpoint
            )
        found = super()._prepare_for_training(max_steps, train_dataloader, None)
        if resume_from_checkpoint is not None:
            self._load_from_checkpoint(resume_from_checkpoint)
            sharding.load_zero(self, Path(resume_from_checkpoint))
        return found

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.sharded_by == "FSDP2" and self.training_adapters():
            sharding.save_optimizer(self, Path(output_dir))
        elif self.sharded_by == "ZeRO-3" and self.training_adapters():
            sharding.save_zero(self, Path(output_dir))
        else:
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self.sharded_by == "FSDP2" and self.training_adapters():
            sharding.load_optimizer(self, Path(checkpoint))
        else:
            super()._load_optimizer_and_scheduler(checkpoint)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        found = self.training_adapters()
        if not found:
            super()._save(output_dir, state_dict)
            return
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir or ".")
        checkpoints.save_adapters(found, folder, resumable=self._folder is not None)
        tokenizer = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(folder))
        (folder / "training_args.json").write_text(self.args.to_json_string())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        found = self.training_adapters()
        if not found:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        folder = Path(resume_from_checkpoint)
        manifest = checkpoints.read_manifest(folder)
        checkpoints.check_methods(found, manifest, folder)
        if not self.args.ignore_data_skip:
            self._get_train_sampler()
            checkpoints.check_data(self._data_order(), manifest, folder)
        made_by = manifest.get("processes", self.args.world_size)
        sharding.check_processes(self.sharded_by, made_by, self.args.world_size, folder)
        self._fill(found, folder)
        self._unlogged = manifest["unlogged"]["loss"], manifest["unlogged"]["step"]

    def _load_best_model(self) -> None:
        found = self.training_adapters()
        if not found:
            super()._load_best_model()
            return
        self._fill(found, Path(str(self.state.best_model_checkpoint)))

    def _fill(self, found: list[Adapter], folder: Path) -> None:
        with contextlib.ExitStack() as whole:
            for adapter in found if self.sharded_by else ():
                whole.enter_context(saving.whole(adapter, write=True))
            checkpoints.load_adapters(found, folder)

    def restore_loss(self) -> None:
        """Puts back what a resumed run had summed up since it logged the loss last."""
        if self._unlogged is not None:
            loss, self._globalstep_last_logged = self._unlogged
            self._tr_loss.fill_(loss)
            self._unlogged = None


class Trainer(TrainerMixin, transformers.Trainer):
    """transformers' Trainer with what `TrainerMixin` adds."""


def _unwrapped(trainer: TrainerMixin) -> nn.Module:
    """Returns the model itself; DDP and compilation don't wrap `trainer.model`, FSDP does."""
    model: Any = trainer.model
    wrapped = getattr(trainer, "is_fsdp_enabled", False)
    return trainer.accelerator.unwrap_model(model) if wrapped else model


def _padding(model: Any, dataset: Any) -> PadToLongest | None:
    """Returns the collator for examples of tokens, None for others."""
    sized = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__") and len(dataset)
    if not sized or "input_ids" not in dataset[0]:
        return None
    token = getattr(getattr(model, "config", None), "pad_token_id", None)
    return PadToLongest(0 if token is None else token)


def _how_to_go_on(kept: Path | None) -> str:
    if kept is None:
        return "No checkpoint had been written."
    return f'Kept "{kept}"; go on with trainer.train(resume_from_checkpoint={os.fspath(kept)!r}).'
