"""What is attached to a model: adapters, each the deltas of one method, and which of them act.

All of it hangs on one object, `model.__dict__["_graftune"]`, and on the sites below the hosts.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from graftune.anatomy import Anatomy, anatomy
from graftune.anatomy.modules import is_in
from graftune.anatomy.packed import elements
from graftune.composition import members_of
from graftune.errors import AdapterError, FormatError, SettingsError, TrainingError
from graftune.methods.base import Method
from graftune.sites import masks
from graftune.sites.base import Graft
from graftune.sites.copies import Copies
from graftune.sites.placing import block_of
from graftune.sites.state import Active, carry_plan_through_checkpoints

if TYPE_CHECKING:
    from graftune.merging import Merged

STATE = "_graftune"


class Adapter:
    """All deltas of one method attached under one name, with the head trained with it.

    Attributes:
        name: what it is called on its model.
        method: its settings.
        model: the model it is attached to.
        grafts: its deltas and their places, the head's last.
        head_names: paths of the head modules of which it has its own values.
        trainable: whether its tensors get gradients while it is active.
        total_steps: optimizer steps of the run that trains it, once `begin` told them.
    """

    def __init__(
        self,
        name: str,
        method: Method,
        model: nn.Module,
        grafts: list[Graft],
        heads: tuple[str, ...],
    ) -> None:
        self.name, self.method, self.model, self.grafts = name, method, model, grafts
        self.head_names = heads
        self.trainable = True
        self.total_steps: int | None = None

    @property
    def anatomy(self) -> Anatomy:
        """What the model it is attached to is made of."""
        return state_of(self.model).anatomy

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yields (absolute name, tensor), each once: what a file keeps, parameters and buffers."""
        if self.method.trains_in_place:
            yield from self.model.named_parameters()
        seen: set[int] = set()
        for graft in self.grafts:
            for name, tensor in graft.tensors():
                if id(tensor) not in seen:
                    seen.add(id(tensor))
                    yield name, tensor

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yields (absolute name, trained tensor), each once."""
        for name, tensor in self.named_tensors():
            if isinstance(tensor, nn.Parameter):
                yield name, tensor

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yields the trained tensors."""
        for _, tensor in self.named_parameters():
            yield tensor

    def state_dict(self, *, training: bool = False) -> dict[str, Tensor]:
        """Returns every tensor by its absolute name, detached.

        Args:
            training: those too that only resumed training needs.
        """
        found = {name: tensor.detach() for name, tensor in self.named_tensors()}
        return found | dict(self._training_tensors()) if training else found

    def _training_tensors(self) -> Iterator[tuple[str, Tensor]]:
        for graft in self.grafts:
            yield from graft.training_tensors()

    def load_state_dict(self, tensors: dict[str, Tensor], strict: bool = True) -> None:
        """Copies tensors in, all or none; those for resumed training may be missing.

        Raises:
            FormatError: for missing, unexpected or misshaped tensors, listing them.
        """
        resumed = dict(self._training_tensors())
        own = dict(self.named_tensors()) | resumed
        wrong = [f"{k} is missing" for k in own if k not in tensors and k not in resumed]
        wrong += [f"{k} is unexpected" for k in tensors if k not in own]
        wrong = wrong if strict else []
        wrong += [
            f"{k} is {tuple(tensors[k].shape)}, expected {tuple(own[k].shape)}"
            for k in own
            if k in tensors and tensors[k].shape != own[k].shape
        ]
        if wrong:
            more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
            raise FormatError(f'Adapter "{self.name}": {"; ".join(wrong[:5])}{more}.')
        with torch.no_grad():
            for name, tensor in tensors.items():
                if name in own:
                    own[name].copy_(tensor)

    def start_from(self, source: Adapter, *, task: int | str | None = None) -> Adapter:
        """Takes another adapter's values as the initial ones; a head keeps its own.

            source = gt.load(model, "prompts/mnli", name="mnli")
            adapter = gt.attach(model, gt.PromptTuning(length=20)).start_from(source)

        Args:
            source: trained before; of the same method and places, or any soft prompt for another.
            task: which of the source's, where it has several: a number, "average" or "shared".

        Raises:
            AdapterError: the source has other tensors, or no such task.
        """
        if self.method.trains_in_place or source.method.trains_in_place:
            raise AdapterError(
                f'"{self.name}" can\'t start from "{source.name}": one trains the base in place.'
            )
        try:
            self.method.start_from(self, source, task)
        except FormatError as error:
            raise AdapterError(f'No start from "{source.name}". {error}') from None
        return self

    def count(self) -> int:
        """Returns the number of trained parameters, its head's included."""
        return sum(elements(tensor) for tensor in self.parameters())

    def begin(self, total_steps: int) -> None:
        """Tells how many optimizer steps a training loop of one's own will take.

            adapter.begin(len(batches))
            for step, batch in enumerate(batches, 1):
                loss = model(**batch).loss + adapter.penalty()
                loss.backward()
                optimizer.step()
                adapter.advance(step)
                optimizer.zero_grad()
            adapter.finish()

        gt.Trainer does all of this, `gt.AdapterCallback` does it in another Trainer.

        Raises:
            SettingsError: the method's schedule doesn't fit so many steps.
        """
        if isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1:
            raise SettingsError(
                f'Adapter "{self.name}": begin takes the number of optimizer steps, at least 1, '
                f"found {total_steps!r}."
            )
        self.method.check_steps(total_steps)
        self.total_steps = total_steps

    def penalty(self) -> Tensor | float:
        """Returns what training adds to the loss: the method's penalty, a scalar, or 0.0."""
        found = self.method.penalty(self)
        return 0.0 if found is None else found

    def advance(self, step: int) -> None:
        """Moves the method's schedule on, after optimizer step `step` and before its zero_grad.

        Raises:
            TrainingError: `begin` was not called, or the step is not one of its steps.
        """
        if self.total_steps is None:
            raise TrainingError(
                f'Adapter "{self.name}": call adapter.begin(total_steps) before the first step, so '
                f"that {self.method.name} knows its schedule."
            )
        if not 1 <= step <= self.total_steps:
            raise TrainingError(
                f'Adapter "{self.name}": step {step} is not one of the {self.total_steps} that '
                "adapter.begin was told; begin again with the right total."
            )
        self.method.advance(self, step, self.total_steps)

    def finish(self) -> None:
        """Brings the adapter into its last form once training is over; its tensors may change.

        Optimizers made before still hold the old ones, so go on training with a new one.
        """
        self.method.finish(self)

    def save(self, path: str | Path) -> Path:
        """Writes the adapter's directory, whole or not at all, and returns its path."""
        return _formats().save(self, path)

    def __repr__(self) -> str:
        return f"Adapter({self.name!r}, {self.method.name}, {self.count():,} parameters)"


class FileConfig:
    """An adapter's settings as transformers asks for them when it saves."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter

    def to_dict(self) -> dict[str, Any]:
        """Returns the content of `adapter_config.json`."""
        return _formats().file_config(self.adapter)

    def save_pretrained(self, folder: str | Path, **_: Any) -> None:
        """Writes the files beside the tensors, `adapter_config.json` among them."""
        _formats().write_config(self.adapter, folder)


class Grafts:
    """What is attached to one model, and which of it acts.

    It also answers what transformers asks of a model with adapters, so that `save_pretrained` and
    the stock Trainer write the active adapter alone.
    """

    def __init__(self, model: nn.Module, parts: Anatomy) -> None:
        self.model = model
        self.anatomy = parts
        self.active = Active()
        self.adapters: dict[str, Adapter] = {}
        self.merged: Merged | None = None
        self.thawed = [name for name, p in model.named_parameters() if p.requires_grad]
        self.checkpointed = [m for m in model.modules() if hasattr(m, "gradient_checkpointing")]
        self.handles: list[Any] = []
        self.copies: Copies | None = None
        self.watches_masks = False

    def copy_rows(self) -> None:
        """Readies the model for a Parallel, once."""
        if self.copies is None:
            self.copies = Copies(self.model, self.anatomy, self.active, self.lowest_block)
            self.handles += self.copies.handles

    def watch_masks(self) -> None:
        """Notes the masks of each pass from now on, once."""
        if not self.watches_masks:
            self.watches_masks = True
            self.handles += masks.watch(self.model, self.anatomy)

    def lowest_block(self, names: tuple[str, ...]) -> int | None:
        """Returns the lowest block in which some adapters act; None if one acts below the blocks.

        Of adapters that have heads alone it is the highest.
        """
        positions = self.anatomy.positions
        found = [len(positions) - 1]
        for name in names:
            adapter = self.adapters[name]
            for graft in adapter.grafts:
                layer = block_of(graft.place.module, positions)
                if layer is not None:
                    found.append(layer)
                elif not is_in(graft.place.module, adapter.head_names):
                    return None
        return min(found)

    def prepare(self, module: nn.Module, args: Any) -> None:
        """Readies a forward pass. A forward pre-hook of the model."""
        self.active.draw(module.training)
        if not module.training:
            return
        if any(m.gradient_checkpointing for m in self.checkpointed):
            carry_plan_through_checkpoints(self.model, self.active)
        for name in self.active.current().names:
            self._begin_training_pass(self.adapters[name])

    def _begin_training_pass(self, adapter: Adapter) -> None:
        for graft in adapter.grafts:
            graft.delta.begin_forward()
        if adapter.total_steps is None and torch.is_grad_enabled() and adapter.trainable:
            _check_driven(adapter)

    def active_adapters(self) -> list[str]:
        """Returns the names of the active adapters. Asked by transformers."""
        names = [n for n in members_of(self.active.current().composition) if n in self.adapters]
        if not names:
            raise AdapterError(
                "No adapter is active, so there is none to save: activate one of "
                f"{', '.join(self.adapters)}, or detach all to save the base."
            )
        return names

    def get_adapter_state_dict(
        self, adapter_name: str | None = None, state_dict: dict[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Returns the tensors that an adapter's file holds. Asked by transformers."""
        return _formats().file_tensors(self.adapters[adapter_name or self.active_adapters()[0]])

    @property
    def peft_config(self) -> dict[str, Any]:
        """What transformers asks to write the adapter's settings."""
        return {name: FileConfig(adapter) for name, adapter in self.adapters.items()}

    def tell_transformers(self) -> None:
        """Sets on the model what transformers looks for, or takes it away."""
        model = self.model.__dict__
        living = [a for a in self.adapters.values() if not a.method.trains_in_place]
        if self.merged is not None:
            living = [a for a in living if a.name not in self.merged.names]
        if living:
            model["_hf_peft_config_loaded"] = True
            model["peft_config"] = self.peft_config
            model["active_adapters"] = self.active_adapters
            model["get_adapter_state_dict"] = self.get_adapter_state_dict
        else:
            for name in ("_hf_peft_config_loaded", "peft_config", "active_adapters"):
                model.pop(name, None)
            model.pop("get_adapter_state_dict", None)


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """Returns the model's adapters by name; empty for a plain model."""
    state = plain_model(model).__dict__.get(STATE)
    return dict(state.adapters) if state is not None else {}


def state_of(model: nn.Module) -> Grafts:
    """Returns what is attached to a model.

    Raises:
        AdapterError: if nothing is.
    """
    state = plain_model(model).__dict__.get(STATE)
    if state is None:
        raise AdapterError(f"No adapter is attached to this {type(model).__name__}.")
    return state


def anatomy_of(model: nn.Module) -> Anatomy:
    """Returns what a model is made of, looked at once if adapters are attached to it."""
    state = plain_model(model).__dict__.get(STATE)
    return anatomy(model) if state is None else state.anatomy


def plain_model(model: nn.Module) -> nn.Module:
    """Returns the model inside torch.compile's wrapper, or the model."""
    inner = getattr(model, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else model


def _check_driven(adapter: Adapter) -> None:
    """Raises TrainingError if nobody will call the penalty and the schedule that a method needs."""
    if adapter.method.needs_steps(adapter):
        raise TrainingError(
            f'Adapter "{adapter.name}": {adapter.method.name} has a penalty or a schedule that '
            "training must call: train it with gt.Trainer, pass callbacks=[gt.AdapterCallback()] "
            "to another Trainer, or in a loop of your own call adapter.begin(total_steps) first, "
            "add adapter.penalty() to the loss, and call adapter.advance(step) after each "
            "optimizer.step() and adapter.finish() at the end."
        )


def _formats() -> Any:
    # formats/ builds on this module; an adapter's own `save` is the one look back.
    return importlib.import_module("graftune.formats")
