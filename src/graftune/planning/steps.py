"""One step of training, run on tensors without numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from graftune.adapter import Adapter
from graftune.errors import GraftuneError, SettingsError
from graftune.methods.base import Method
from graftune.planning import emulating, offloading, optimizers, quantised
from graftune.planning.batches import batch_of
from graftune.planning.settings import PlanSettings
from graftune.planning.skeletons import Base, attached, make_fake, meta_model
from graftune.planning.tracking import ADAPTER, BATCH, GRADIENTS, WEIGHTS, Ledger
from graftune.tasks.gguf_models import quiet
from graftune.training.chunked_loss import chunked_loss

GRAINS = {"cpu": 64, "cuda": 512}
"""Bytes that the allocators round up to."""
STEPS = 100_000
"""Steps that a schedule is told of: enough for any."""


@dataclass(frozen=True)
class Simulated:
    """What a simulated step needed."""

    device: dict[str, int]
    """Bytes by part at the device's peak."""
    host: dict[str, int]
    """Bytes by part at the host's peak, of what was moved there."""
    floor: int
    """Bytes of the loaded model and its adapter on the device."""
    base_bytes: int
    adapter_bytes: int
    base_count: int
    trained: int
    adapter_dtype: str
    flops: int
    traffic: int
    """Bytes that other operations than products of matrices read and write."""


def simulate(base: Base, method: Method, settings: PlanSettings) -> Simulated:
    """Returns what one step of training needs.

    Raises:
        SettingsError: the method can't act on the model, or the model asks for numbers.
    """
    with quiet():
        return _simulate(base, method, settings)


def _simulate(base: Base, method: Method, settings: PlanSettings) -> Simulated:
    model = meta_model(base, getattr(torch, settings.precision))
    adapter = attached(model, method)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    make_fake(model, mode)
    ledger = Ledger(_vocabulary(base.config), GRAINS[settings.device])
    with mode:
        quantised.quantise(model, adapter, settings)
        floor = _book(model, adapter, settings, ledger)
        try:
            with ledger:
                _step(base, model, adapter, settings, ledger)
        except GraftuneError:
            raise
        except Exception as error:  # whatever a model's own code does with tensors without numbers
            raise SettingsError(
                f"{base.name} with {method.name} can't be planned, since its step doesn't run "
                f"without numbers: {type(error).__name__}: {_first_line(error)}."
            ) from error
    return _simulated(model, adapter, ledger, floor)


def _book(model: Any, adapter: Adapter, settings: PlanSettings, ledger: Ledger) -> int:
    """Books what is loaded before the step; returns its bytes on the device."""
    own = {id(tensor) for graft in adapter.grafts for _, tensor in graft.tensors()}
    for tensor in (*model.parameters(), *model.buffers()):
        is_own = id(tensor) in own and not adapter.method.trains_in_place
        ledger.note(tensor, ADAPTER if is_own else WEIGHTS)
        if not is_own and not tensor.requires_grad and "parameters" in settings.offload:
            ledger.move_to_host(tensor)
    return sum(ledger.peak().values())


def _step(base: Base, model: Any, adapter: Adapter, settings: PlanSettings, ledger: Ledger) -> None:
    """Takes the step: optimizer states first, then forward, backward, and the update."""
    adapter.begin(STEPS)
    trained = [one for one in model.parameters() if one.requires_grad]
    ledger.phase = "states"
    optimizer = optimizers.prepared(trained, settings, ledger)
    ledger.part = BATCH
    batch = batch_of(base, model, settings)
    ledger.part = None
    if settings.accumulation > 1:
        for one in trained:
            one.grad = torch.zeros_like(one)
            ledger.note(one.grad, GRADIENTS)
    if settings.gradient_checkpointing:
        checkpoint(model, settings)
    ledger.phase = "forward"
    ledger.flops = ledger.traffic = 0
    with _like_training(model, settings, ledger):
        loss = loss_of(model, batch, settings, "cpu") + adapter.penalty()
        ledger.end_forward()
        ledger.phase = "backward"
        loss.backward()
    ledger.phase = "update"
    _update(trained, optimizer, settings, ledger)


def loss_of(model: Any, batch: dict[str, Tensor], settings: PlanSettings, device: str) -> Tensor:
    """Returns the loss of a batch as the Trainer computes it; a mean where the model has none."""
    with emulating.autocast(settings, device):
        output = model(**batch)
    loss = output.get("loss")
    return output[0].float().mean() if loss is None else loss


def _update(trained: list[Tensor], optimizer: Any, settings: PlanSettings, ledger: Ledger) -> None:
    for one in trained:
        if one.grad is not None:
            ledger.note(one.grad, GRADIENTS)
    if settings.max_grad_norm:
        torch.nn.utils.clip_grad_norm_(trained, settings.max_grad_norm)
    if "optimizer" not in settings.offload:
        optimizer.step()


@contextlib.contextmanager
def _like_training(model: nn.Module, settings: PlanSettings, ledger: Ledger) -> Iterator[None]:
    """Lets kernels save what the device's would, and what is offloaded go to the host."""
    with contextlib.ExitStack() as stack:
        if settings.device == "cuda":
            stack.enter_context(emulating.CudaLike(settings))
        if "activations" in settings.offload:
            stack.enter_context(offloading.activations(model, ledger))
        if "parameters" in settings.offload:
            stack.enter_context(offloading.parameters(model))
        stack.enter_context(chunked(model, settings))
        yield


def chunked(model: nn.Module, settings: PlanSettings) -> contextlib.AbstractContextManager[Any]:
    """Lets a language model compute its loss piece by piece inside the block, if that's asked."""
    if settings.loss_chunk is None:
        return contextlib.nullcontext()
    return chunked_loss(model, settings.loss_chunk)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no word"])[0].rstrip(".")


def checkpoint(model: Any, settings: PlanSettings | None = None) -> None:
    """Lets a model compute its activations twice; with settings, as their device would.

    Raises:
        SettingsError: it can't.
    """
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise SettingsError(
            f"{type(model).__name__} has no gradient checkpointing: plan it without."
        )
    older = model.gradient_checkpointing_enable  # its name before transformers 5.23
    enable = getattr(model, "activation_checkpointing_enable", older)
    more: dict[str, Any] = {}
    if settings is not None and settings.device == "cuda":  # a backward pass leaves modes outside
        more["context_fn"] = lambda: (contextlib.nullcontext(), emulating.CudaLike(settings))
    enable({"use_reentrant": False, **more})


def _vocabulary(config: Any) -> int | None:
    size = getattr(config.get_text_config(), "vocab_size", None)
    return int(size) if size else None


def _simulated(model: Any, adapter: Adapter, ledger: Ledger, floor: int) -> Simulated:
    own = [tensor for graft in adapter.grafts for _, tensor in graft.tensors()]
    trained = [one for one in model.parameters() if one.requires_grad]
    every = {id(one): one for one in (*model.parameters(), *model.buffers())}
    in_place = adapter.method.trains_in_place
    ids = set() if in_place else {id(tensor) for tensor in own}
    base = [one for key, one in every.items() if key not in ids]
    kept = trained if in_place else list({id(one): one for one in own}.values())
    return Simulated(
        device=ledger.peak(),
        host=ledger.peak(host=True),
        floor=floor,
        base_bytes=sum(one.nbytes for one in base),
        adapter_bytes=sum(one.nbytes for one in kept),
        base_count=sum(one.numel() for one in base if isinstance(one, nn.Parameter)),
        trained=sum(one.numel() for one in trained),
        adapter_dtype=str(trained[0].dtype).removeprefix("torch.") if trained else "none",
        flops=ledger.flops,
        traffic=ledger.traffic,
    )
