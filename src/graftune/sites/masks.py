"""Which tokens of a pass are real: the masks that the model is given, for deltas that ask.

    model(input_ids, attention_mask)        noted by thread, for the stack that they mask
    delta: masks.real("encoder", x)         (rows, tokens) of what it sees, None where all are real

Nothing is noted unless an attached delta asks for it. What checkpoints recompute sees the masks of
its own pass.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

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
    """

    by_stack: Mapping[str, Any]
    at: RowsAt | None = None


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


def of_rows(at: RowsAt) -> contextlib.AbstractContextManager[None]:
    """Lets `real` answer for some rows of the batch until the block ends."""
    before = noted()
    return seen_as(replace(before, at=at)) if before.by_stack else contextlib.nullcontext()


def woven(old: Any, new: Tensor) -> None:
    """Puts the mask of a longer sequence in the place of the one it was made from."""
    masks = noted()
    if any(mask is old for mask in masks.by_stack.values()):
        by_stack = {k: new if mask is old else mask for k, mask in masks.by_stack.items()}
        _now.noted = replace(masks, by_stack=by_stack)


def real(stack: str, x: Tensor) -> Tensor | None:
    """Returns which tokens of a stack are real, `(rows, tokens)`, or None where all are.

    Args:
        stack: "encoder" or "decoder".
        x: what is looked at, `(rows, tokens, width)`; with a cache, the last tokens.

    Raises:
        AdapterError: the mask doesn't say it of these tokens.
    """
    masks = noted()
    mask = masks.by_stack.get(stack)
    if mask is None:
        return None
    fits = isinstance(mask, Tensor) and mask.ndim == 2
    if fits and masks.at is not None:
        mask = taken(mask, masks.at)
    if not fits or x.ndim != 3 or mask.shape[0] != x.shape[0] or mask.shape[1] < x.shape[1]:
        found = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise AdapterError(
            f"A gate that is a mean over real tokens needs an attention_mask of (rows, tokens) for "
            f'what it sees, {tuple(x.shape)}; found {found}. Take gate="token".'
        )
    return mask[:, mask.shape[1] - x.shape[1] :] != 0


class Watch:
    """Notes the masks that one module is given."""

    def __init__(self, module: nn.Module, stacks: Mapping[str, str], is_start: bool) -> None:
        self.stacks, self.is_start = stacks, is_start
        self.order = tuple(inspect.signature(module.forward).parameters)

    def see(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Notes them. A forward pre-hook."""
        given = dict(zip(self.order, args, strict=False)) | kwargs
        found = {stack: given.get(argument) for argument, stack in self.stacks.items()}
        before = {} if self.is_start else noted().by_stack
        _now.noted = Noted({**before, **found})


def watch(model: nn.Module, anatomy: Anatomy) -> list[Any]:
    """Returns handles of hooks that note what a model, its body and its encoder are given."""
    kinds = [stack.kind for stack in anatomy.stacks if stack.kind in _TEXT]
    both = set(kinds) == {"encoder", "decoder"}
    stacks = {"attention_mask": kinds[0]} if kinds else {}
    if both:
        stacks = {"attention_mask": "encoder", "decoder_attention_mask": "decoder"}
    body: Any = getattr(model, "base_model", model)
    watches = {module: Watch(module, stacks, is_start=True) for module in (body, model)}
    if both:  # generate runs the encoder by itself
        encoder: Any = body.get_encoder()
        watches[encoder] = Watch(encoder, {"attention_mask": "encoder"}, is_start=False)
    return [
        module.register_forward_pre_hook(one.see, with_kwargs=True, prepend=True)
        for module, one in watches.items()
    ]
