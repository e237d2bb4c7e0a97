"""The loss of language models a few tokens at a time, so that whole logits are never there.

Logits are often the largest thing in training: 8 rows of 2,048 tokens over 128,000 words are 8 GiB
in float32, kept more than once. While a pass runs, the head answers `Deferred` logits; the model's
own code goes on with them, whatever it does before its loss.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from graftune.attached import STATE, plain_model
from graftune.errors import TrainingError
from graftune.sites.state import Active, Replay
from graftune.training.deferred import Deferred, Source

TRIED = 64
"""Tokens of a row that both ways of computing the loss are tried on."""
TOLERANCE, HALF_TOLERANCE = 1e-4, 2e-2
"""How far the two may differ, of a loss: from logits in float32, and in types of 16 bits."""


@contextlib.contextmanager
def chunked_loss(model: nn.Module, tokens: int) -> Iterator[Deferring]:
    """Lets a language model compute its loss piece by piece inside the block.

        with gt.chunked_loss(model, tokens=512):
            loss = model(**batch).loss
        loss.backward()

    Loss and gradients are those of whole logits, but for the order of sums: label smoothing,
    shifts, scales and caps of logits, biases and adapters of the head included.

    Args:
        model: with a head of the vocabulary.
        tokens: how many to compute at once, of all rows together; at least one of each row is.

    Yields:
        what tells how often logits were deferred, and what asked for whole ones all the same.

    Raises:
        TrainingError: `tokens` isn't a number of them, or the model has no such head.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=99, n_embd=8, n_layer=1, n_head=2))
        >>> ids = torch.arange(8)[None]
        >>> with chunked_loss(model, tokens=2) as found:
        ...     loss = model(ids, labels=ids).loss
        >>> found.calls, found.asked_whole
        (1, [])
    """
    head = head_of(model, tokens)
    state = plain_model(model).__dict__.get(STATE)
    defers = Deferring(head, tokens, None if state is None else state.active)
    head.__dict__["_call_impl"] = defers
    try:
        yield defers
    finally:
        head.__dict__.pop("_call_impl", None)


def head_of(model: nn.Module, tokens: int) -> nn.Module:
    """Returns a language model's head.

    Raises:
        TrainingError: it has none, or `tokens` isn't a number of tokens.
    """
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        raise TrainingError(f"loss_chunk is a number of tokens, at least 1, found {tokens!r}.")
    found: Any = getattr(plain_model(model), "get_output_embeddings", lambda: None)()
    if not isinstance(found, nn.Module):
        raise TrainingError(
            f"loss_chunk is {tokens}, but {type(plain_model(model)).__name__} has no head of the "
            "vocabulary: it is for language models; leave it out."
        )
    return found


class Deferring:
    """Stands for a head's call, hooks and all: answers logits that aren't computed yet.

    Attributes:
        calls: how often it did.
        asked_whole: names of what asked for whole logits all the same.
        dtype: of the logits.
    """

    def __init__(self, head: nn.Module, tokens: int, active: Active | None) -> None:
        self.head, self.tokens, self.active = head, tokens, active
        self.calls = 0
        self.dtype: torch.dtype | None = None
        self.asked_whole: list[str] = []

    def __call__(self, states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Answers deferred logits of states; what else is asked, as the head itself."""
        run = self._run
        if args or kwargs or states.ndim < 2:
            return run(states, *args, **kwargs)
        if self.active is not None:  # the backward pass may run after the plan has changed
            run = Replay(run, self.active, self.active.current())
        with torch.no_grad():
            first = run(states[..., :1, :])
        self.calls, self.dtype = self.calls + 1, first.dtype
        sample = first.reshape(-1, first.shape[-1])[:1]
        source = Source(run, states, self.tokens, self.asked_whole)
        return Deferred.of(source, (), tuple(states.shape[:-1]), sample)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.head)._call_impl(self.head, *args, **kwargs)


class LossChunks:
    """The chunked loss of a Trainer: tried on its first batch, then used or left out."""

    def __init__(self, tokens: int | None) -> None:
        self.tokens = tokens
        self.why_not: str | None = None
        self._is_tried = False

    @property
    def summary(self) -> str | None:
        """Whether the loss was computed in pieces, in a sentence; None if nobody asked."""
        if self.tokens is None:
            return None
        if self.why_not is not None:
            return f"The loss was computed from whole logits (no loss_chunk): {self.why_not}."
        return f"The loss was computed {self.tokens:,} tokens at a time; logits were never whole."

    def check(self, model: Any, args: TrainingArguments, forward: Any) -> None:
        """Raises TrainingError if a Trainer can't compute its loss in pieces."""
        if self.tokens is None:
            return
        if model is not None:
            head_of(model, self.tokens)
        reasons = {
            "`forward`, which has a loss of its own": forward is not None,
            "torch_compile": args.torch_compile,
            "use_liger_kernel, which computes losses in pieces itself": args.use_liger_kernel,
            f"DataParallel on {args.n_gpu} devices (torchrun goes)": args.n_gpu > 1,
        }
        for reason, is_so in reasons.items():
            if is_so:
                raise TrainingError(
                    f"loss_chunk is {self.tokens}, but doesn't go with {reason}: leave out one."
                )

    def passing(self, model: nn.Module) -> contextlib.AbstractContextManager[Any]:
        """Returns what a training pass runs in."""
        if self.tokens is None or self.why_not is not None or not model.training:
            return contextlib.nullcontext()
        return chunked_loss(model, self.tokens)

    def try_once(
        self, model: nn.Module, batch: Mapping[str, Any], loss: Callable[[Any], Any]
    ) -> None:
        """Computes the loss of some tokens both ways, once; if they differ, warns and turns off.

        Args:
            model: what trains.
            batch: its first one.
            loss: answers a batch's loss.
        """
        few = None if self._is_tried or not model.training else _few(batch)
        if few is None or self.tokens is None:
            return
        self._is_tried = True
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        try:
            with torch.no_grad():
                self.why_not = self._difference(model, few, loss)
        finally:
            for module, mode in modes:
                module.training = mode
        if self.why_not is not None:
            warnings.warn(f"loss_chunk is left out: {self.why_not}.", UserWarning, stacklevel=2)

    def _difference(
        self, model: nn.Module, few: dict[str, Any], loss: Callable[[Any], Any]
    ) -> str | None:
        plain = loss(dict(few))
        try:
            with chunked_loss(model, TRIED // 4) as found:
                pieces = loss(dict(few))
        except Exception as error:  # whatever it is, the loss in one piece has none
            return f"{type(error).__name__}: {str(error).splitlines()[0].rstrip('.')}"
        if not found.calls:
            return f"{type(plain_model(model)).__name__} computes logits without calling its head"
        if found.asked_whole:
            asked = ", ".join(dict.fromkeys(found.asked_whole))
            return f"the model or its loss asks for whole logits ({asked})"
        near = HALF_TOLERANCE if found.dtype in (torch.float16, torch.bfloat16) else TOLERANCE
        if not torch.allclose(plain, pieces, rtol=near, atol=1e-6, equal_nan=True):
            return f"the loss of a few tokens is {plain.item():g} whole and {pieces.item():g} so"
        return None


def _few(batch: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns one row of a batch, and of what is as long as its labels some tokens that count.

    None where no label of the batch counts.
    """
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or labels.ndim != 2 or not bool((labels != -100).any()):
        return None
    row, first = (int(at) for at in (labels != -100).nonzero()[0])
    start = max(0, first - TRIED // 2)
    few: dict[str, Any] = {}
    for name, value in batch.items():
        is_tensor = isinstance(value, Tensor) and value.shape[:1] == labels.shape[:1]
        few[name] = value[row : row + 1] if is_tensor else value
        if is_tensor and value.shape == labels.shape:
            few[name] = few[name][:, start : start + TRIED]
    return few
