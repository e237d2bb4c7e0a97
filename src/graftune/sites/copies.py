"""Parallel: the batch is copied for each member, at the lowest block in which one of them acts.

    B rows ── embeddings ── block 0 ── ... ──(copied)── block n ── ... ── head ── members x B rows

Where a model's head looks at the inputs again, where it has several stacks, or where a member acts
below the blocks, the inputs are copied instead, and nothing is shared.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from graftune.anatomy import Anatomy
from graftune.sites.plan import Plan
from graftune.sites.state import Active

LABELS = ("labels", "start_positions", "end_positions", "class_labels", "next_sentence_label")
INPUTS = ("input_ids", "inputs_embeds", "pixel_values", "input_features", "decoder_input_ids")
FLAT = ("alibi",)
"""Arguments of blocks that have rows and heads in one dimension (BLOOM)."""
NOT_ROWS = ("rel_embeddings",)
"""Arguments of blocks whose first dimension isn't rows, whatever its size (DeBERTa)."""


class Copies:
    """The hooks that copy a model's batch while a Parallel acts.

    Args:
        model: the base.
        anatomy: what it is made of.
        active: the state that its sites share.
        lowest: returns the lowest block in which some adapters act, or None if one acts below.
    """

    def __init__(
        self,
        model: nn.Module,
        anatomy: Anatomy,
        active: Active,
        lowest: Callable[[tuple[str, ...]], int | None],
    ) -> None:
        self.active, self.lowest = active, lowest
        self.shares = _shares(model, anatomy)
        self.handles = [
            model.register_forward_pre_hook(self.begin, with_kwargs=True, prepend=True),
            model.register_forward_hook(self.end, always_call=True),
        ]
        for block in anatomy.blocks if self.shares else ():
            hook = BlockCopies(self, block.position)
            module = model.get_submodule(block.path)
            self.handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def start(self, plan: Plan) -> int | None:
        """Returns the block before which the batch is copied; None if the inputs are."""
        if plan.lowest is None:
            plan.lowest = (self.lowest(plan.names) if self.shares else None,)
        start = plan.lowest[0]
        return start if start is None else max(start, plan.drop)

    def begin(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Copies labels, and the inputs if nothing is shared. A forward pre-hook of the model."""
        plan = self.active.current()
        if plan.copies == 1:
            return None
        plan.copying.add(threading.get_ident())
        rows = _batch(args, kwargs)
        if self.start(plan) is None:
            return _copied(args, rows, plan.copies), _copied(kwargs, rows, plan.copies)
        labels = {key: kwargs[key] for key in LABELS if key in kwargs}
        return args, {**kwargs, **_copied(labels, rows, plan.copies)}

    def end(self, model: nn.Module, args: Any, output: Any) -> None:
        """Ends the pass. A forward hook of the model, run even if it fails."""
        self.active.current().copying.discard(threading.get_ident())


class BlockCopies:
    """Copies what enters one block."""

    def __init__(self, copies: Copies, position: int) -> None:
        self.copies, self.position = copies, position

    def __call__(self, block: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """A forward pre-hook of the block."""
        plan = self.copies.active.current()
        if plan.copies == 1:
            return None
        start = self.copies.start(plan)
        if start is None or self.position < start:
            return None
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        n, rows = plan.copies, hidden.shape[0]
        if self.position == start:
            return _copied(args, rows, n), _copied(kwargs, rows, n)
        rows //= n
        if args:
            return (hidden, *_copied(args[1:], rows, n)), _copied(kwargs, rows, n)
        others = {key: value for key, value in kwargs.items() if key != "hidden_states"}
        return args, {"hidden_states": hidden, **_copied(others, rows, n)}


def _shares(model: nn.Module, anatomy: Anatomy) -> bool:
    """Whether the blocks below the adapters can run once for all members."""
    if len(anatomy.stacks) != 1:
        return False
    name, kind = type(model).__name__, anatomy.stacks[0].kind
    if kind == "decoder":  # heads that classify look for the last token in the ids
        return name.endswith(("CausalLM", "LMHeadModel", "Model"))
    return getattr(model.config, "classifier_pooling", None) != "mean"


def _batch(args: Any, kwargs: Mapping[str, Any]) -> int:
    given = [kwargs.get(name) for name in INPUTS] + list(args)
    return next(value.shape[0] for value in given if isinstance(value, Tensor))


def _copied(given: Any, rows: int, n: int, name: str = "") -> Any:
    """Returns arguments with those that have `rows` rows repeated n times, one copy after another.

    What has one row for all is left to broadcast, unless the batch is a single row.
    """
    if isinstance(given, Tensor):
        has_rows = given.ndim and given.shape[0] == rows and (given.ndim > 1 or name in LABELS)
        if (has_rows or name in FLAT) and name not in NOT_ROWS:
            return given.repeat(n, *[1] * (given.ndim - 1))
        return given
    if isinstance(given, Mapping):
        made = {key: _copied(value, rows, n, str(key)) for key, value in given.items()}
        return made if type(given) is dict else type(given)(**made)
    if type(given) in (tuple, list):
        return type(given)(_copied(value, rows, n) for value in given)
    return given
