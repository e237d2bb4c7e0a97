"""Which tokens of a pass are real: the masks that the model is given, for deltas that ask.

    model(input_ids, attention_mask)        noted by thread, for the stack that they mask
    delta: masks.real("encoder", x)         (rows, tokens) of what it sees, None where all are real
           masks.before("decoder")          how many tokens the cache held when the pass began

Nothing is noted unless an attached delta asks for it. What checkpoints recompute sees the masks of
its own pass.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftune.anatomy import Anatomy
from graftune.errors import AdapterError
from graftune.sites.plan import RowsAt, taken

_TEXT = ("encoder", "decoder", "text")


@dataclass(frozen=True)
class Noted:
    """The masks of one pass.

    Attributes:
        by_stack: `(B, n)` by the kind of stack; None where it has none.
        at: the rows of the batch that are looked at now; None for all.
        batch: how many rows there are, where `at` is given: B, or a multiple where it is copied.
        before: tokens in the cache when the pass began, by the kind of stack.
        found: what was found out in this pass already.
        seeing: how many of the last tokens of the pass see infixes: for all rows, or `(B,)`; None
            where nobody said it.
    """

    by_stack: Mapping[str, Any]
    at: RowsAt | None = None
    batch: int = 0
    before: Mapping[str, int] = field(default_factory=dict[str, int])
    found: dict[Any, Any] = field(default_factory=dict[Any, Any])
    seeing: int | Tensor | None = None


_NOTHING = Noted({})
_now = threading.local()


def noted() -> Noted:
    """Returns the masks of the pass that the calling thread runs."""
    return getattr(_now, "noted", _NOTHING)


@contextlib.contextmanager
def seen_as(masks: Noted) -> Iterator[None]:
    """Puts masks in force for the calling thread until the block ends."""
    before, _now.noted = noted(), masks
    try:
        yield
    finally:
        _now.noted = before


def of_rows(at: RowsAt, batch: int) -> contextlib.AbstractContextManager[None]:
    """Lets `real` answer for some rows of a batch until the block ends."""
    now = noted()
    if not now.by_stack and now.seeing is None:
        return contextlib.nullcontext()
    return seen_as(replace(now, at=at, batch=batch))


def woven(old: Any, new: Tensor, stack: str | None = None) -> None:
    """Puts the mask of a longer sequence in the place of the one it was made from.

    Args:
        old: the mask as it was given.
        new: that of the longer sequence.
        stack: whose it is; None where there is one stack alone.
    """
    now = noted()
    found = (name for name, mask in now.by_stack.items() if mask is old)
    stack = next(found, None) if stack is None else stack
    if stack in now.by_stack:
        _now.noted = replace(now, by_stack={**now.by_stack, stack: new}, found={})


def see_infixes(last: int | Tensor | None) -> None:
    """Notes how many of the last tokens of the calling thread's pass see infixes."""
    _now.noted = replace(noted(), seeing=last, found={})


def seeing_infixes(rows: int) -> int | Tensor | None:
    """Returns how many of the last tokens see infixes: in all rows, or `(rows,)`; None if unsaid.

    Args:
        rows: how many are looked at.
    """
    last = noted().seeing
    return of_those_rows(last, rows) if isinstance(last, Tensor) else last


def before(stack: str) -> int:
    """Returns how many tokens of a stack the cache held when the pass began."""
    return noted().before.get(stack, 0)


def once(key: Any, find: Callable[[], Any]) -> Any:
    """Returns what `find` does, called once a pass (and rows) for all that ask by one key."""
    now, at = noted(), noted().at
    rows = (at.start, at.stop) if isinstance(at, slice) else at if at is None else id(at)
    if (key, rows) not in now.found:
        now.found[key, rows] = find()
    return now.found[key, rows]


def real(stack: str, x: Tensor) -> Tensor | None:
    """Returns which tokens of a stack are real, `(rows, tokens)`, or None where all are.

    Args:
        stack: "encoder" or "decoder".
        x: what is looked at, `(rows, tokens, width)`; with a cache, the last tokens.

    Raises:
        AdapterError: the mask doesn't say it of these tokens.
    """
    mask = whole(stack, x, "A gate that is a mean over real tokens", ' Take gate="token".')
    return None if mask is None else mask[:, mask.shape[1] - x.shape[1] :]


def whole(stack: str, x: Tensor, asks: str, mend: str = "") -> Tensor | None:
    """Returns which tokens are real as `real`, but also of those before, which a cache holds.

    Args:
        stack: its kind.
        x: what is looked at, `(rows, tokens, width)`.
        asks: who asks, for the message.
        mend: what to do then, for its end.

    Raises:
        AdapterError: the mask doesn't say it of these tokens.
    """
    mask = _by_token(noted().by_stack.get(stack), stack)
    if mask is None:
        return None
    tokens = before(stack) + x.shape[1] if x.ndim == 3 else 0
    if isinstance(mask, Tensor) and mask.ndim == 2 and stack in noted().before:
        mask = mask[:, :tokens]  # a static cache has room for more
        mask = F.pad(mask, (tokens - mask.shape[1], 0))  # or is a window of the last
    mask = of_those_rows(mask, x.shape[0])
    if not isinstance(mask, Tensor) or tuple(mask.shape) != (x.shape[0], tokens):
        found = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise AdapterError(
            f"{asks} needs an attention_mask of (rows, tokens) for what it sees, "
            f"{tuple(x.shape)}; found {found}.{mend}"
        )
    return mask != 0


def _by_token(mask: Any, stack: str) -> Any:
    """Returns a mask of attention, as transformers makes them for static caches, by token.

    `(rows, 1, tokens, n)`, or one for each kind of attention; who is seen by no token is padding.
    """
    if isinstance(mask, Mapping):
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if stack not in noted().before or not isinstance(mask, Tensor) or mask.ndim != 4:
        return mask
    return (mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0).any(1)


def of_those_rows(mask: Any, rows: int) -> Any:
    """Returns a mask's rows that are looked at now, repeated where the batch was copied."""
    now = noted()
    if not isinstance(mask, Tensor):
        return mask
    batch = now.batch if now.at is not None else rows
    if mask.shape[0] and batch > mask.shape[0] and batch % mask.shape[0] == 0:
        mask = mask.repeat(batch // mask.shape[0], *[1] * (mask.ndim - 1))
    return mask if now.at is None else taken(mask, now.at)


class Watch:
    """Notes the masks that one module is given.

    Args:
        module: which.
        stacks: the kind of stack by the argument that is its mask.
        cached: the kind of stack whose tokens the module's cache holds, if any.
        is_start: whether a pass begins with it.
    """

    def __init__(
        self, module: nn.Module, stacks: Mapping[str, str], cached: str | None, is_start: bool
    ) -> None:
        self.stacks, self.cached, self.is_start = stacks, cached, is_start
        self.order = tuple(inspect.signature(module.forward).parameters)

    def see(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Notes them. A forward pre-hook."""
        given = dict(zip(self.order, args, strict=False)) | kwargs
        found = {stack: given.get(argument) for argument, stack in self.stacks.items()}
        now = Noted({}, seeing=noted().seeing) if self.is_start else noted()
        lengths, cache = dict(now.before), given.get("past_key_values")
        if self.cached is not None and cache is not None:
            lengths[self.cached] = int(cache.get_seq_length())
        _now.noted = Noted({**now.by_stack, **found}, before=lengths, seeing=now.seeing)


def watch(model: nn.Module, anatomy: Anatomy) -> list[Any]:
    """Returns handles of hooks that note what a model, its body and its encoder are given."""
    kinds = [stack.kind for stack in anatomy.stacks if stack.kind in _TEXT]
    both = set(kinds) == {"encoder", "decoder"}
    stacks = {"attention_mask": kinds[0]} if kinds else {}
    if both:
        stacks = {"attention_mask": "encoder", "decoder_attention_mask": "decoder"}
    cached = "decoder" if both else next(iter(kinds), None)
    body: Any = getattr(model, "base_model", model)
    watches = {module: Watch(module, stacks, cached, is_start=True) for module in (body, model)}
    if both:  # generate runs the encoder by itself
        encoder: Any = body.get_encoder()
        watches[encoder] = Watch(encoder, {"attention_mask": "encoder"}, None, is_start=False)
    return [
        module.register_forward_pre_hook(one.see, with_kwargs=True, prepend=True)
        for module, one in watches.items()
    ]
