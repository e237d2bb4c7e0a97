"""Logits that aren't there yet: what a head will answer, computed a few tokens at a time.

    states (B, T, H) ──[head]── logits (B, T, V) ──[· scale, tanh, float, ...]── cross-entropy
                    └─ kept       └─ never there whole: each piece of T is computed, reduced and
                                     forgotten, and computed again in the backward pass

What models do with their logits on the way to a loss acts on each token by itself, and is noted.
What reduces them (cross-entropy, a sum, a gathering) is computed piece by piece. Anything else gets
the whole logits, as if nothing were deferred: so the answer is right, whatever a family does.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from graftune.errors import TrainingError

_BY_TOKEN = frozenset(
    (
        *("mul", "__mul__", "__rmul__", "div", "true_divide", "__truediv__", "add", "__add__"),
        *("__radd__", "sub", "__sub__", "neg", "__neg__", "tanh", "log_softmax"),
        *("float", "double", "half", "bfloat16", "to", "clone"),
    )
)
"""Names of what answers each token's logits from these alone."""
_FORM = frozenset(
    (
        *("shape", "size", "dim", "ndim", "numel", "__len__", "dtype", "device", "get_device"),
        *("is_cuda", "is_sparse", "is_meta", "layout", "is_floating_point", "is_complex"),
        *("requires_grad", "grad_fn", "is_leaf", "element_size"),
    )
)
"""Names of what asks for a form, not for numbers."""
_CROSS_ENTROPY = inspect.signature(functional.cross_entropy)


class Source(NamedTuple):
    """Where deferred logits come from."""

    head: Callable[[Tensor], Tensor]
    """Answers the logits of states."""
    states: Tensor
    """What the head was given, `(..., T, H)`."""
    tokens: int
    """How many to compute at once."""
    asked_whole: list[str]
    """What asked for whole logits; shared with who wants to know."""


class Deferred(Tensor):
    """Logits `(..., V)` of a source after some steps, not computed.

    Attributes:
        source: where they come from.
        steps: what is done to a piece's logits, in order.
        sample: one token's logits, all ones but the last dimension: their form after the steps.
    """

    source: Source
    steps: tuple[Callable[[Tensor], Tensor], ...]
    sample: Tensor

    @staticmethod
    def of(
        source: Source,
        steps: tuple[Callable[[Tensor], Tensor], ...],
        leading: tuple[int, ...],
        sample: Tensor,
    ) -> Deferred:
        """Returns logits of shape `(*leading, V)`.

        Args:
            source: where they come from.
            steps: what is done to a piece's logits.
            leading: sizes before the last one: those of the states, or all in one.
            sample: one token's logits after the steps.
        """
        made: Any = Tensor._make_wrapper_subclass(
            Deferred, (*leading, sample.shape[-1]), dtype=sample.dtype, device=sample.device
        )
        made.source, made.steps = source, steps
        made.sample = sample.reshape((1,) * len(leading) + sample.shape[-1:])
        return made

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Notes, reduces, or gives whole logits to what is called with deferred ones."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        if name == "__get__":  # of an attribute
            name = func.__self__.__name__
        if name in _FORM:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        others = [v for v in (*args[1:], *kwargs.values()) if isinstance(v, Deferred)]
        if args and isinstance(args[0], Deferred) and not others:
            found = args[0]._called(func, name, args[1:], kwargs)
            if found is not NotImplemented:
                return found
        return _whole(func, name, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Refuses what looks for numbers behind torch's functions.

        Raises:
            TrainingError: always.
        """
        raise TrainingError(f"loss_chunk: {func} asks for logits where they can't be computed.")

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"Deferred(shape={tuple(self.shape)}, dtype={self.dtype})"

    def whole(self) -> Tensor:
        """Returns the logits, computed in one piece."""
        return _stepped(self.source.head(self.source.states), self.steps).reshape(self.shape)

    def _called(self, func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        if name == "cross_entropy":
            return self._cross_entropy(*args, **kwargs)
        if name == "__getitem__":
            return self._cut(args[0])
        if name == "contiguous":
            return self
        if name in ("view", "reshape"):
            return self._viewed(args)
        if name in ("gather", "sum"):
            return self._reduced(func, args, kwargs)
        if name in _BY_TOKEN:
            return self._noted(func, args, kwargs)
        return NotImplemented

    def _noted(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Returns the logits after one more step, which acts on each token by itself."""
        if not all(map(_is_the_same_for_all, (*args, *kwargs.values()))):
            return NotImplemented
        if func.__name__ == "log_softmax":
            given = _dim_last(self.ndim, args, kwargs)
            if given is None:
                return NotImplemented
            args, kwargs = given
        with torch.no_grad():
            sample = func(self.sample, *args, **kwargs)
        if sample.shape != self.sample.shape:
            return NotImplemented
        named = {key: _flat(value) for key, value in kwargs.items()}
        step = partial(_step, func, tuple(map(_flat, args)), named)
        return Deferred.of(self.source, (*self.steps, step), tuple(self.shape[:-1]), sample)

    def _viewed(self, args: Any) -> Any:
        """Returns the logits in another form of which tokens are rows; not of the vocabulary."""
        sizes = tuple(args[0]) if len(args) == 1 and not isinstance(args[0], int) else args
        leading = self.source.states.shape[:-1]
        forms = [(*leading, self.shape[-1]), (leading.numel(), self.shape[-1])]
        for form in forms:
            fits = len(sizes) == len(form)
            if fits and all(s in (-1, n) for s, n in zip(sizes, form, strict=True)):
                return Deferred.of(self.source, self.steps, tuple(form[:-1]), self.sample)
        return NotImplemented

    def _cut(self, index: Any) -> Any:
        """Returns the logits of a part of the tokens: those of that part of the states."""
        index = index if isinstance(index, tuple) else (index,)
        states = self.source.states
        if states.ndim != self.ndim or not all(i is ... or isinstance(i, slice) for i in index):
            return NotImplemented
        if ... in index:
            at = index.index(...)
            missing = self.ndim - len(index) + 1
            index = (*index[:at], *[slice(None)] * missing, *index[at + 1 :])
        if len(index) == self.ndim and index[-1] != slice(None):
            return NotImplemented
        source = self.source._replace(states=states[index])
        return Deferred.of(source, self.steps, tuple(source.states.shape[:-1]), self.sample)

    def _reduced(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Returns what a sum over the vocabulary, or a gathering from it, answers."""
        given = _dim_last(self.ndim, args, kwargs)
        if given is None:
            return NotImplemented
        args, kwargs = given
        index = args[1] if len(args) > 1 and isinstance(args[1], Tensor) else kwargs.get("index")
        if index is None:
            pieces = self._pieces(partial(_step, func, args, kwargs))
        elif index.shape[:-1] != self.shape[:-1]:
            return NotImplemented
        else:
            leading = self.source.states.shape[:-1]
            pieces = self._pieces(_gathered, index.reshape(*leading, index.shape[-1]))
        found = torch.cat(pieces, self.source.states.ndim - 2)
        keeps = found.ndim == self.source.states.ndim
        return found.reshape(*self.shape[:-1], *found.shape[-1:][: int(keeps)])

    def _cross_entropy(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the cross-entropy, its reduction included; of class numbers, not of shares."""
        given = _CROSS_ENTROPY.bind(self, *args, **kwargs)
        given.apply_defaults()
        said = given.arguments
        target = said["target"]
        is_plain = all(said[name] is None for name in ("weight", "size_average", "reduce"))
        if self.ndim != 2 or target.is_floating_point() or not is_plain:
            return NotImplemented
        settings = {name: said[name] for name in ("ignore_index", "label_smoothing")}
        reduction = "none" if said["reduction"] == "none" else "sum"
        target = target.reshape(self.source.states.shape[:-1])
        pieces = self._pieces(partial(_entropy, settings, reduction), target)
        if reduction == "none":
            return torch.cat(pieces, target.ndim - 1).reshape(-1).to(self.dtype)
        total = torch.stack(pieces).sum()
        if said["reduction"] == "mean":
            total = total / (target != said["ignore_index"]).sum()
        return total.to(self.dtype)

    def _pieces(self, last: Callable[..., Tensor], *beside: Tensor) -> list[Tensor]:
        """Returns what `last` answers of each piece's logits, and of that piece of what is beside.

        Args:
            last: takes logits `(..., t, V)` and pieces `(..., t, ...)`.
            beside: tensors that begin with the states' sizes but the last.
        """
        states = self.source.states
        rows = math.prod(states.shape[:-2])
        step, at = max(1, self.source.tokens // max(1, rows)), states.ndim - 2
        run = partial(_piece, self.source.head, self.steps, last)
        parts = zip(states.split(step, at), *(b.split(step, at) for b in beside), strict=True)
        if not torch.is_grad_enabled():
            return [run(*part) for part in parts]
        return [checkpoint(run, *part, use_reentrant=False) for part in parts]


def _piece(
    head: Callable[[Tensor], Tensor], steps: Any, last: Callable[..., Tensor], *part: Tensor
) -> Tensor:
    states = part[0].contiguous()  # as what comes back from offloading is, so that kernels agree
    return last(_stepped(head(states), steps), *part[1:])


def _stepped(logits: Tensor, steps: tuple[Callable[[Tensor], Tensor], ...]) -> Tensor:
    for step in steps:
        logits = step(logits)
    return logits


def _step(func: Any, args: Any, kwargs: dict[str, Any], logits: Tensor) -> Tensor:
    return func(logits, *args, **kwargs)


def _gathered(logits: Tensor, index: Tensor) -> Tensor:
    return logits.gather(-1, index)


def _entropy(settings: dict[str, Any], reduction: str, logits: Tensor, target: Tensor) -> Tensor:
    """Returns a piece's cross-entropy; in float32 at least, since sums of pieces follow."""
    rows = logits.flatten(0, -2)
    rows = rows if rows.dtype == torch.float64 else rows.float()
    found = functional.cross_entropy(rows, target.flatten(), reduction=reduction, **settings)
    return found.reshape(target.shape) if reduction == "none" else found


def _whole(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    """Calls a function with whole logits in place of deferred ones.

    Raises:
        TrainingError: it would write to them, which nothing that was noted before would see.
    """
    writes = (name.endswith("_") and not name.endswith("__")) or name in ("__setitem__", "__set__")
    if writes or kwargs.get("out") is not None:
        raise TrainingError(f"loss_chunk: the model writes to its logits in place ({name}).")
    named = {key: _computed(name, value) for key, value in kwargs.items()}
    return func(*(_computed(name, value) for value in args), **named)


def _computed(name: str, value: Any) -> Any:
    """Returns an argument with whole logits in place of deferred ones, in lists too."""
    if isinstance(value, Deferred):
        value.source.asked_whole.append(name)
        return value.whole()
    if type(value) in (list, tuple):
        return type(value)(_computed(name, item) for item in value)
    return value


def _is_the_same_for_all(value: Any) -> bool:
    """Whether an argument is the same for each token: no tensor, or one with a last dimension."""
    return not isinstance(value, Tensor) or value.numel() == math.prod(value.shape[-1:])


def _flat(value: Any) -> Any:
    """Returns an argument in the form that any piece takes: `(V,)` of a tensor."""
    return value.reshape(value.shape[-1:]) if isinstance(value, Tensor) else value


def _dim_last(
    ndim: int, args: Any, kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Returns arguments that say the last dimension by -1; None where they say another one."""
    if "dim" in kwargs:
        is_last = kwargs["dim"] in (-1, ndim - 1, (-1,), [-1])
        return (tuple(args), {**kwargs, "dim": -1}) if is_last else None
    is_last = bool(args) and args[0] in (-1, ndim - 1, (-1,), [-1])
    return ((-1, *args[1:]), kwargs) if is_last else None
