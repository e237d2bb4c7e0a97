"""The infix site: tells attentions from which token of each row on infixes are seen.

    [ x_1 .. x_n ; INFIX ; y_1 .. y_t ]          P seen by x_n, y_1, .., y_t; by no x before

The infix stands between prompt x and answer y. x_n is the first to see it, since what it answers is
y_1: the separator of Li & Liang 2021, whose code puts infixes before it. Where y begins is said by

    labels        the first that isn't -100, in each row
    infix_at      the number of tokens of the row before y, padding too; one for all, or each row's
    generate      what it is given is x, and what it makes is y, in the cache or without one

A pass is told how many of its last tokens see the infix, so that what stands in front of them
(padding, a soft prompt, a cache) needn't be known.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from graftune.anatomy import Anatomy
from graftune.errors import AdapterError, SettingsError
from graftune.sites import masks
from graftune.sites.base import Delta, Graft, InfixPlace, Site
from graftune.sites.embedding import MARK
from graftune.sites.state import Active

SAY = (
    "pass labels of (rows, tokens) that are -100 before the answer, or infix_at= with the number "
    "of tokens before it, or call generate, which is given no token of the answer"
)
_prompts = threading.local()


class InfixBegin(Delta):
    """Marks an adapter that has infixes; it has no tensors."""


class Generating:
    """A model's `generate`, in which infixes know where the prompt ends.

    It hangs on the model itself, as transformers calls no hook before `generate`, and goes with the
    last infix.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, *args: Any, infix_at: Any = None, **kwargs: Any) -> Any:
        """Generates as the model's class does.

        Args:
            args: as there.
            infix_at: the number of tokens before the answer, where some of it is given already.
            kwargs: as there.
        """
        model: Any = self.model
        at = _prompt_length(args, kwargs) if infix_at is None else infix_at
        with model.deltas.infix.prompt(at):
            return type(model).generate(model, *args, **kwargs)


class InfixSite(Site):
    """Where the answer begins, of the passes of a whole model."""

    def __init__(self, active: Active) -> None:
        super().__init__(active)
        self.arguments: tuple[str, ...] = ()

    def hook(self, host: nn.Module) -> None:
        """Registers `begin` and `end`, and puts `Generating` in the place of `generate`."""
        self.arguments = tuple(inspect.signature(host.forward).parameters)
        self.handles = [
            host.register_forward_pre_hook(self.begin, with_kwargs=True, prepend=True),
            host.register_forward_hook(self.end, always_call=True),
        ]
        if hasattr(type(host), "generate"):
            host.__dict__["generate"] = Generating(host)

    def unhook(self, host: nn.Module) -> None:
        """See `Site.unhook`: the model has its own `generate` again."""
        super().unhook(host)
        host.__dict__.pop("generate", None)

    @contextlib.contextmanager
    def prompt(self, at: Any) -> Iterator[None]:
        """Lets the calling thread's passes know, inside the block, where the prompt ends."""
        known: dict[int, Any] = _prompts.__dict__.setdefault("known", {})
        before = known.get(id(self))
        known[id(self)] = at
        try:
            yield
        finally:
            known[id(self)] = before

    def begin(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Notes which tokens of a pass see infixes. A forward pre-hook of the whole model.

        Raises:
            AdapterError: an infix acts, and nothing says where the answer begins.
        """
        given = {**dict(zip(self.arguments, args, strict=False)), **kwargs}
        at = given.get("infix_at")
        at = getattr(_prompts, "known", {}).get(id(self)) if at is None else at
        plan = self.active.current()
        if any(self.holds(steps) for steps, _ in plan.groups or ((plan.steps, ()),)):
            masks.see_infixes(_seeing(given, at))
        if "infix_at" in kwargs:
            return args, {name: value for name, value in kwargs.items() if name != "infix_at"}
        return None

    def end(self, model: nn.Module, args: Any, output: Any) -> None:
        """Forgets it. A forward hook of the whole model, run even if it fails."""
        masks.see_infixes(None)


def seen_by(rows: int) -> int | Tensor:
    """Returns how many of the last tokens of the pass see infixes, in all rows or `(rows,)`.

    Raises:
        AdapterError: nobody said it.
    """
    last = masks.seeing_infixes(rows)
    if last is None:
        raise AdapterError(
            "An infix acts in a part of the model that was run by itself: run the whole model, and "
            f"{SAY}."
        )
    return last


def infixes(method: str, model: nn.Module, anatomy: Anatomy) -> list[Graft]:
    """Returns the graft that tells infixes where the answer begins.

    Raises:
        SettingsError: the model isn't a decoder alone.
    """
    kinds = [stack.kind for stack in anatomy.stacks]
    if kinds != ["decoder"]:
        raise SettingsError(
            f'{method}: position="infix" is for causal decoders, whose prompt sees nothing of what '
            f"follows it; this {type(model).__name__} has blocks of {' and '.join(kinds)}."
        )
    return [Graft(InfixPlace(), InfixBegin())]


def _seeing(given: dict[str, Any], at: Any) -> int | Tensor:
    """Returns how many of the last tokens of a pass see infixes."""
    ids = given.get("input_ids")
    tokens: Tensor = given["inputs_embeds"] if ids is None else ids
    rows, length = tokens.shape[:2]
    if at is not None:
        return _from(at, rows, length, given.get("past_key_values"), tokens.device)
    labels = given.get("labels")
    if not isinstance(labels, Tensor) or labels.shape != (rows, length):
        found = f"labels of {tuple(labels.shape)}" if isinstance(labels, Tensor) else "no labels"
        raise AdapterError(f"An infix is seen from where the answer begins, found {found}: {SAY}.")
    is_answer = labels != -100
    first = is_answer.int().argmax(1)
    last = (length - first + 1).clamp(max=length)
    return last.masked_fill(~is_answer.any(1), 0)


def _from(at: Any, rows: int, length: int, cache: Any, device: torch.device) -> int | Tensor:
    """Returns how many of a pass's last tokens see infixes if the answer begins at `at`."""
    past = 0 if cache is None else int(cache.get_seq_length())
    mark = getattr(cache, MARK, None)
    known = past + length - (0 if mark is None or not past else mark.woven.most)
    if isinstance(at, int) and at >= 0:
        return min(max(known - at + 1, 0), length)
    found = torch.as_tensor(at, device=device).reshape(-1)
    if found.is_floating_point() or not len(found) or rows % len(found) or bool((found < 0).any()):
        raise AdapterError(
            f"infix_at is {at}, expected a number of tokens, or one for each of {rows} rows."
        )
    return (known - found.repeat_interleave(rows // len(found)) + 1).clamp(0, length)


def _prompt_length(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Returns how many tokens `generate` is given; with a cache, the mask may tell of more."""
    given = [*args[:1], *(kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds"))]
    mask = kwargs.get("attention_mask")
    whole = [mask] if isinstance(mask, Tensor) and mask.ndim == 2 else []
    lengths = [int(value.shape[1]) for value in [*given, *whole] if isinstance(value, Tensor)]
    return max(lengths, default=1)
