"""What every site of one model reads: the adapters that act in this forward pass."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graftune.composition import AdapterDrop, Composition
from graftune.sites import masks
from graftune.sites.kept import Kept
from graftune.sites.plan import Plan


@dataclass(eq=False)
class Pin:
    """One `pinned` block: a task started inside it inherits it, until the block ends."""

    active: Active
    plan: Plan
    is_live: bool = True


_pins: ContextVar[tuple[Pin, ...]] = ContextVar("pins", default=())


class Turn:
    """Lets one thread at a time run a host whose tensors are others: they hang on the host itself.

    A thread takes it before the host's forward and drops it after; what an interrupted forward
    kept, the end of its `using` drops.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._mine = threading.local()

    @property
    def held(self) -> int:
        """How often the calling thread has taken it."""
        return getattr(self._mine, "held", 0)

    def take(self) -> None:
        """Waits until no other thread has it."""
        self._lock.acquire()
        self._mine.held = self.held + 1

    def drop(self, down_to: int) -> None:
        """Gives back what the calling thread took beyond `down_to` times."""
        while self.held > down_to:
            self._mine.held -= 1
            self._lock.release()


class Active:
    """The state that a model's sites share: the plan in force.

    `set` holds for good; `pinned` holds for the caller's thread or task alone. `overridden` counts
    the live `pinned` contexts, so that the usual path costs one look at an attribute.
    """

    def __init__(self) -> None:
        self.plan = Plan.of(None)
        self.overridden = 0
        self.turn = Turn()
        self.given = Kept()
        """What a pass was given for sites alone."""
        self._counting = threading.Lock()

    def set(
        self,
        composition: Composition,
        drop: int | AdapterDrop | None = None,
        tasks: tuple[int, ...] = (),
    ) -> None:
        """Makes a composition the one in force for every thread."""
        self.plan = Plan.of(composition, drop, tasks)

    def current(self) -> Plan:
        """Returns the plan in force for the caller."""
        pin = self._pin() if self.overridden else None
        return self.plan if pin is None else pin.plan

    def draw(self, training: bool) -> None:
        """Draws how many blocks the next pass drops.

        A new plan says so, since what is checkpointed keeps the one that its forward saw.
        """
        pin = self._pin() if self.overridden else None
        if pin is None:
            self.plan = self.plan.drawn(training)
        else:
            pin.plan = pin.plan.drawn(training)

    def _pin(self) -> Pin | None:
        pins = (pin for pin in reversed(_pins.get()) if pin.active is self and pin.is_live)
        return next(pins, None)

    @contextlib.contextmanager
    def pinned(self, plan: Plan) -> Iterator[None]:
        """Puts a plan in force for the caller's thread or task until the block ends."""
        pin, held = Pin(self, plan), self.turn.held
        self._count(1)
        token = _pins.set((*_pins.get(), pin))
        try:
            yield
        finally:
            pin.is_live = False
            self.turn.drop(held)
            self._count(-1)
            _pins.reset(token)

    def _count(self, more: int) -> None:
        with self._counting:
            self.overridden += more

    def __getstate__(self) -> dict[str, Any]:
        """Leaves live contexts behind: a copy starts with the plan set for good."""
        return {"plan": self.plan}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()
        self.plan = state["plan"]


class Recompute:
    """A checkpointing function whose recomputation sees the plan that its forward saw.

    The backward pass may run after `using` has ended, or on another thread; the plan travels with
    the checkpointed call. Blocks below the lowest one that trains are left out of the backward
    pass: what has no gradient to pass on is not recomputed.
    """

    def __init__(self, checkpoint: Callable[..., Any], active: Active) -> None:
        self.checkpoint = checkpoint
        self.active = active

    @property
    def is_reentrant(self) -> bool:
        """Whether only arguments with a gradient let gradients through, as torch's default does."""
        return getattr(self.checkpoint, "keywords", {}).get("use_reentrant") is not False

    def __call__(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Checkpoints `run(*args)` under the present plan."""
        if not torch.is_grad_enabled():
            return run(*args)
        if not any(map(_needs_grad, args)):
            if not _trains(run, self.active.current().drop):
                with _without_checkpoints(_modules_of(run)):
                    return run(*args)
            if self.is_reentrant:
                args = _with_gradient(args)
        return self.checkpoint(Replay(run, self.active, self.active.current()), *args, **kwargs)


def _needs_grad(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _trains(run: Callable[..., Any], drop: int) -> bool:
    """Whether a call makes a gradient by itself; true where what it calls can't be told."""
    if any(map(_needs_grad, getattr(run, "keywords", {}).values())):
        return True
    modules = _modules_of(run)
    idle = _dropped(modules, drop) if drop else set[int]()
    found = (p for module in modules for p in module.parameters() if id(p) not in idle)
    return not modules or any(p.requires_grad for p in found)


def _dropped(modules: list[nn.Module], drop: int) -> set[int]:
    """Returns the ids of the tensors of sites that a drop leaves out."""
    parts: list[Any] = [part for module in modules for part in module.modules()]
    sites = [p for p in parts if isinstance(p.__dict__.get("active"), Active) and p.layer < drop]
    return {id(tensor) for site in sites for tensor in site.parameters()}


def _modules_of(run: Callable[..., Any]) -> list[nn.Module]:
    """Returns the modules that a bound or a partial method belongs to."""
    inner = (*getattr(run, "args", ()), getattr(run, "__self__", None))
    return [value for value in inner if isinstance(value, nn.Module)]


@contextlib.contextmanager
def _without_checkpoints(modules: list[nn.Module]) -> Iterator[None]:
    """Lets modules run as if not checkpointed: T5's attentions else make a gradient of nothing."""
    parts = (part for module in modules for part in module.modules())
    marked: list[Any] = [m for m in parts if m.__dict__.get("gradient_checkpointing")]
    for module in marked:
        module.gradient_checkpointing = False
    try:
        yield
    finally:
        for module in marked:
            module.gradient_checkpointing = True


def _with_gradient(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Returns arguments of which the first tensor of numbers has a gradient, here cut off."""
    found = list(args)
    for at, value in enumerate(found):
        if isinstance(value, Tensor) and value.is_floating_point():
            found[at] = value.detach().requires_grad_(True)
            break
    return tuple(found)


class Replay:
    """A call that sees, whenever it runs, the plan and the masks of when it was made."""

    def __init__(self, run: Callable[..., Any], active: Active, plan: Plan) -> None:
        self.run, self.active, self.plan = run, active, plan
        self.masks = masks.noted()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs it."""
        with self.plan.copied(), masks.seen_as(self.masks):
            if self.active.current() is self.plan:
                return self.run(*args, **kwargs)
            with self.active.pinned(self.plan):
                return self.run(*args, **kwargs)


def carry_plan_through_checkpoints(model: nn.Module, active: Active) -> None:
    """Wraps the checkpointing functions that transformers hung on the model's blocks.

    With them it also makes the embeddings' outputs ask for gradients, so that torch's reentrant
    checkpoints pass some on; the wrapped functions see to that from the first trained block on.
    """
    wrapped: set[bool] = set()
    asking: list[Any] = []
    for module in model.modules():
        function = module.__dict__.get("_gradient_checkpointing_func")
        if function is not None and not isinstance(function, Recompute):
            module.__dict__["_gradient_checkpointing_func"] = Recompute(function, active)
        if module.__dict__.get("gradient_checkpointing"):
            wrapped.add(function is not None)
        if module.__dict__.get("_require_grads_hooks"):
            asking.append(module)
    for module in asking if wrapped == {True} else ():
        module.disable_input_require_grads()
