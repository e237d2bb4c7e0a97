"""The attention site of models that compute their softmax themselves: BLOOM and DeBERTa-v2.

    weights = softmax [ s q P_k' ; scores ]       the prefix's columns are split off again
    output = weights V + (those of P) P_v + ...   where the weights meet the values

The attention gets some of its arguments as tensors that show a `Pass` what is made of them: its
query, its scores, its values. They last as long as the call; nothing else is changed, in no other
thread and no other model. It is slower than a function of one's own, and as exact.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftune.errors import AdapterError
from graftune.sites.attention import AttentionSite
from graftune.sites.base import AttentionDelta, Site
from graftune.sites.kept import Kept
from graftune.sites.plan import RowsAt, taken
from graftune.sites.prefixes import Prefix, by_head, prefixes

WATCHED = ("alibi", "attention_mask", "query_states")
"""Arguments from which query and scores come; query states are the hidden states if not given."""


@dataclass(frozen=True)
class Scores:
    """One softmax of an attention.

    Its answer is the weights of the model's own keys, which the model goes on with, beside what is
    added once they have met the values: `(B, q, H, k + D)`.
    """

    module: nn.Module
    query: Tensor  # (B, H, q, D)
    scores: Tensor  # (B, H, q, k)
    softmax: Callable[[Tensor], Tensor]
    scaling: float
    hidden: Tensor | None = None  # (B, q, width), what the module was given, where a delta reads it

    def run(self) -> tuple[Tensor, None]:
        """Returns the answer without deltas."""
        return self.answer(())

    def rows(self, at: RowsAt) -> Scores:
        """Returns that of some rows of the batch."""
        hidden = None if self.hidden is None else taken(self.hidden, at)
        query, scores = taken(self.query, at), taken(self.scores, at)
        return replace(self, query=query, scores=scores, hidden=hidden)

    def answer(self, deltas: Sequence[AttentionDelta]) -> tuple[Tensor, None]:
        """Returns the answer of some deltas together."""
        heads = self.query.shape[1]
        found = prefixes(deltas, heads, self.hidden, len(self.query))
        weights, added = self.softmax(self.scores), torch.zeros_like(self.query)
        if found:
            own = torch.cat([self._scores(prefix) for prefix in found], -1)
            both = self.softmax(torch.cat([own, self.scores], -1))
            part, weights = both.split([own.shape[3], self.scores.shape[3]], -1)
            part = F.dropout(part, _dropout(self.module), self.module.training)
            parts = part.split([prefix.length for prefix in found], -1)
            added = sum(map(self._added, found, parts), added)
        added = added.transpose(1, 2)
        for delta in deltas:
            more = delta.added(self.query, self.module, self.scaling)
            added = added if more is None else added + more
        return torch.cat([weights.transpose(1, 2), added], -1), None

    def _scores(self, prefix: Prefix) -> Tensor:
        """Returns a prefix's columns of the scores, `(B, H, q, length)`."""
        made = self.query @ by_head(prefix.key, self.query).transpose(2, 3) * self.scaling
        if prefix.by_token is not None:
            made = made * prefix.by_token[0].to(made.dtype).unsqueeze(1)
        seen, made = prefix.visible(self.query), made.to(self.scores.dtype)
        return made if seen is None else made.masked_fill(~seen, torch.finfo(made.dtype).min)

    def _added(self, prefix: Prefix, weights: Tensor) -> Tensor:
        """Returns the part of a prefix's values in the answer, `(B, H, q, D)`."""
        value = by_head(prefix.value, self.query)
        made = weights.to(value.dtype) @ value
        return made if prefix.by_token is None else made * prefix.by_token[1].unsqueeze(1)


class Pass:
    """One call of an attention, as its watched tensors show it."""

    def __init__(self, site: SoftmaxSite, host: nn.Module) -> None:
        self.site, self.host = site, host
        self.query: Tensor | None = None  # (B * H, q, D)
        self.scaling: float | None = None
        self.added: Tensor | None = None  # (B * H, q, D)

    def see(self, function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Returns what a function answers, with deltas in softmax and weighted values."""
        name = getattr(function, "__name__", "")
        if name == "softmax":
            return self._softmax(lambda x: function(x, *args[1:], **kwargs), _plain(args[0]))
        made = function(*args, **kwargs)
        if name == "baddbmm" and self.query is None:
            self.query, self.scaling = _plain(kwargs["batch1"]), kwargs["alpha"]
        if name == "bmm" and self.query is None:
            self.query = _plain(args[0])
        if name == "bmm" and self.added is not None:
            return made + self.added
        return watched(made, self)

    def _softmax(self, function: Callable[[Tensor], Tensor], scores: Tensor) -> Any:
        if self.query is None:
            raise AdapterError(
                f"The queries of {type(self.host).__name__} weren't seen, so no adapter can act in "
                "its attention: is its code another than that of transformers?"
            )
        batch, heads, length, width = scores.shape
        query = self.query.view(batch, heads, length, -1)
        scaling = self.scaling or _scaling(self.host, query.shape[3])
        hidden = self.site.given()
        packed, _ = self.site.attend(Scores(self.host, query, scores, function, scaling, hidden))
        weights, added = packed.transpose(1, 2).split([width, query.shape[3]], -1)
        self.added = added.reshape(self.query.shape).to(query.dtype)
        return watched(weights.contiguous(), self)


class Watched(Tensor):
    """A tensor of which a `Pass` sees the functions, and of what they make those too."""

    seen_by: Pass

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Shows the function to the pass of the first watched argument."""
        found = next(_watched_in((*args, *(kwargs or {}).values())))
        with torch._C.DisableTorchFunctionSubclass():
            return found.seen_by.see(func, args, kwargs or {})


def watched(value: Any, by: Pass) -> Any:
    """Returns a tensor, or those in a list, as watched; anything else as it is."""
    if isinstance(value, Tensor):
        made = value.as_subclass(Watched)
        made.seen_by = by
        return made
    return type(value)(watched(v, by) for v in value) if type(value) in (list, tuple) else value


def _watched_in(values: Sequence[Any]) -> Iterator[Watched]:
    for value in values:
        if isinstance(value, Watched):
            yield value
        elif isinstance(value, list | tuple):
            yield from _watched_in(value)


def _plain(value: Any) -> Any:
    return value.as_subclass(Tensor) if isinstance(value, Watched) else value


class SoftmaxSite(AttentionSite):
    """Deltas on an attention that computes its softmax itself."""

    arguments: tuple[str, ...] = ()

    def hook(self, host: nn.Module) -> None:
        """Registers `before` and `after`."""
        self.kept = Kept()
        self.arguments = tuple(inspect.signature(host.forward).parameters)
        self.handles = [
            host.register_forward_pre_hook(self.before, with_kwargs=True),
            host.register_forward_hook(self.after),
        ]

    def unhook(self, host: nn.Module) -> None:
        """See `Site.unhook`."""
        Site.unhook(self, host)

    def name_ours(self, host: nn.Module) -> None:
        """Does nothing: the config of such models names no function."""

    def before(self, host: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Lets a pass see what the attention makes of its arguments. A forward pre-hook."""
        plan = self.active.current()
        acts = any(self.holds(steps) for steps, _ in plan.groups or ((plan.steps, ()),))
        if plan.drop > self.layer or not acts:
            return None
        if torch.compiler.is_compiling():
            torch.compiler.disable(_refuse)(host)
        self.keep(args, kwargs)
        given = {**dict(zip(self.arguments, args, strict=False)), **kwargs}
        if "query_states" in self.arguments and given.get("query_states") is None:
            given["query_states"] = given["hidden_states"]
        seen_by = Pass(self, host)
        shown = {name: watched(given[name], seen_by) for name in WATCHED if name in given}
        return (), {**given, **shown}

    def after(self, host: nn.Module, args: Any, output: Any) -> Any:
        """Returns the attention's answer in plain tensors. A forward hook."""
        return tuple(map(_plain, output)) if isinstance(output, tuple) else _plain(output)


def _refuse(host: nn.Module) -> None:
    raise AdapterError(
        f"What acts in the attention of a {type(host).__name__} can't be compiled: run the model "
        "without torch.compile, or gt.activate(model, None)."
    )


def _scaling(host: Any, size: int) -> float:
    """Returns what DeBERTa multiplies scores by: the parts of a score share the root."""
    kinds = getattr(host, "pos_att_type", ())
    return (size * (1 + sum(kind in kinds for kind in ("c2p", "p2c")))) ** -0.5


def _dropout(host: nn.Module) -> float:
    """Returns the chance with which the model drops weights in training."""
    found = (host._modules.get(name) for name in ("attention_dropout", "dropout"))
    return next((float(m.p) for m in found if isinstance(m, nn.Dropout)), 0.0)
