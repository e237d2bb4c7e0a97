"""The attention site: sees queries, keys and values after rotation and cache, adds keys and values.

    K = [P_k ; K]   V = [P_v ; V]   mask = [visible ; mask]   position bias = [0 ; bias]

transformers' attentions look their function up by the config's `_attn_implementation`. The site
puts the name of ours there, which adds what the active deltas have and then calls the model's own.
The function that makes masks is registered under that name too: without, a padded batch would
silently get none. Prefixes aren't in the cache, and no sliding window hides them.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftune.composition import Fused, Mean, Steps
from graftune.errors import AdapterError
from graftune.sites import flex, masks
from graftune.sites.base import AttentionDelta, AttentionPlace, Graft, Site
from graftune.sites.kept import Kept, first, thread_id
from graftune.sites.plan import RowsAt, joined, taken
from graftune.sites.prefixes import Prefix, by_head, columns, narrowed, prefixes, widened

OURS = "graftune_"
KNOWN = ("sdpa", "eager", "flex_attention")
"""Attention functions that a prefix can be put before."""
Attention = Callable[..., tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Call:
    """One call of an attention function."""

    module: nn.Module
    function: Attention
    query: Tensor  # (B, H, q, D)
    key: Tensor  # (B, kv heads, k, D)
    value: Tensor
    mask: Any  # (1 or B, 1 or H, q, k), True or 0 where visible; a BlockMask; or None
    options: dict[str, Any]
    hidden: Tensor | None = None  # (B, q, width), what the module was given, where a delta reads it
    biases: Any = None
    """What computes relative biases, where a delta shifts keys."""

    def run(self) -> tuple[Tensor, Tensor | None]:
        """Returns the output, `(B, q, H, D)`, and the weights where the function gives them."""
        return self.function(
            self.module, self.query, self.key, self.value, self.mask, **self.options
        )

    def answer(self, deltas: Sequence[AttentionDelta]) -> tuple[Tensor, Tensor | None]:
        """Returns output and weights with some deltas together; weights of the own keys alone."""
        width = self.key.shape[2]
        found = prefixes(deltas, self.key.shape[1], self.hidden, self.query.shape[0])
        shifts = any(delta.shifts_keys for delta in deltas)
        call = self if shifts or self.biases is None else replace(self, biases=None)
        call = call.after(found) if found else call
        if any(prefix.by_token is not None for prefix in found):
            output, weights = call.widened(found).run()
            output = narrowed(output, self.value.shape[3], found)
        else:
            output, weights = call.run()
        for delta in deltas:
            more = delta.added(self.query, self.module, self.options.get("scaling"))
            output = output if more is None else output + more
        return output, weights if weights is None else weights[..., -width:]

    def rows(self, at: RowsAt) -> Call:
        """Returns the call for some rows of the batch."""
        batch = self.query.shape[0]

        def cut(value: Any) -> Any:
            rows = isinstance(value, Tensor) and value.ndim > 1 and value.shape[0] == batch
            return taken(value, at) if rows else value

        return replace(
            self,
            query=taken(self.query, at),
            key=taken(self.key, at),
            value=taken(self.value, at),
            mask=flex.of_rows(self.mask, at) if flex.is_block_mask(self.mask) else cut(self.mask),
            hidden=None if self.hidden is None else taken(self.hidden, at),
            options={name: cut(value) for name, value in self.options.items()},
        )

    def after(self, found: Sequence[Prefix]) -> Call:
        """Returns the call with prefixes put before its own keys and values."""
        keys = [by_head(prefix.key, self.key) for prefix in found]
        values = [by_head(prefix.value, self.value) for prefix in found]
        length = sum(key.shape[2] for key in keys)
        ready = self._with_mask()
        options = dict(ready.options)
        bias = options.get("position_bias")
        if bias is not None:
            options["position_bias"] = ready.longer_bias(bias, length)
        mask = ready._longer_mask(found, length)
        key, value = torch.cat([*keys, ready.key], 2), torch.cat([*values, ready.value], 2)
        return replace(ready, key=key, value=value, mask=mask, options=options)

    def _longer_mask(self, found: Sequence[Prefix], length: int) -> Any:
        """Returns a mask with columns for prefixes in front, as they are seen."""
        mask, seen = self.mask, columns(found, self.query)
        if flex.is_block_mask(mask):
            return flex.longer(mask, length, seen)
        if seen is not None:
            if mask is None:
                mask = seen.new_ones(1, 1, self.query.shape[2], self.key.shape[2])
            rows = max(len(mask), len(seen))
            front = seen if mask.dtype == torch.bool else _additive(seen, mask.dtype)
            shape = (rows, mask.shape[1], -1, -1)
            return torch.cat([front.expand(shape), mask.expand(rows, -1, -1, -1)], -1)
        if mask is None:
            return None
        return F.pad(mask, (length, 0), value=True if mask.dtype == torch.bool else 0.0)

    def longer_bias(self, bias: Tensor, length: int) -> Tensor:
        """Returns a position bias for `length` more keys in front: 0, or as if all keys counted."""
        if self.biases is None:
            return F.pad(bias, (length, 0))
        q, k = self.query.shape[2], self.key.shape[2]
        made = self.biases.compute_bias(q, k + length, bias.device, past_seen_tokens=k - q)
        return made.to(bias.dtype)

    def widened(self, found: Sequence[Prefix]) -> Call:
        """Returns the call on wider heads, in which gates of tokens act; see `prefixes`."""
        query, key, value = widened(self.query, self.key, self.value, found)
        options = dict(self.options)
        if options.get("scaling") is None:
            options["scaling"] = self.query.shape[3] ** -0.5
        return replace(self, query=query, key=key, value=value, options=options)

    def _with_mask(self) -> Call:
        """Returns the call with a mask, if it relies on a function that masks by itself."""
        length, given = self.query.shape[2], self.options.get("is_causal")
        is_causal = getattr(self.module, "is_causal", True) if given is None else given
        if self.mask is not None or not is_causal or length == 1:
            return self
        mask = torch.ones(length, length, dtype=torch.bool, device=self.query.device).tril()
        bias = self.options.get("position_bias")
        options = (
            self.options if bias is None else {**self.options, "position_bias": bias[..., :length]}
        )
        return replace(
            self,
            key=self.key[:, :, :length],
            value=self.value[:, :, :length],
            mask=mask[None, None],
            options=options,
        )


class Answers(Protocol):
    """What an attention answers in one pass, with deltas or without."""

    @property
    def query(self) -> Tensor:
        """`(B, H, q, D)`."""
        ...

    def run(self) -> tuple[Tensor, Tensor | None]:
        """Returns the answer of the model alone."""
        ...

    def rows(self, at: RowsAt) -> Answers:
        """Returns the same of some rows of the batch."""
        ...

    def answer(self, deltas: Sequence[AttentionDelta]) -> tuple[Tensor, Tensor | None]:
        """Returns the answer of some deltas together."""
        ...


class AttentionSite(Site):
    """Deltas on one attention's keys and values."""

    def hook(self, host: nn.Module) -> None:
        """Registers `ready`, and puts our function's name into the config for the masks."""
        self.kept = Kept()
        self.handles = [host.register_forward_pre_hook(self.ready, with_kwargs=True)]
        self.name_ours(host)

    def unhook(self, host: nn.Module) -> None:
        """See `Site.unhook`: the config says again what it said."""
        super().unhook(host)
        config: Any = host.config
        config._attn_implementation_internal = base_name(config)

    def take(self, model: nn.Module, name: str, graft: Graft) -> None:
        """See `Site.take`: also keeps what the attention is given, where the delta reads it."""
        assert isinstance(graft.delta, AttentionDelta)
        super().take(model, name, graft)
        self.keeps_input = self.keeps_input or graft.delta.reads_input
        if graft.delta.shifts_keys:
            assert isinstance(graft.place, AttentionPlace)
            assert graft.place.biases is not None
            self.biases = (model.get_submodule(graft.place.biases),)

    biases: tuple[nn.Module, ...] = ()
    """The attention that has the relative biases, where a delta shifts keys; not a child."""
    keeps_input: bool = False
    """Whether a delta reads what the attention is given."""

    def keep(self, args: Any, kwargs: dict[str, Any]) -> None:
        """Keeps what the attention is given until its function asks for it."""
        if self.keeps_input:
            self.kept["hidden", thread_id()] = first(args, kwargs)

    def given(self) -> Tensor | None:
        """Returns what `keep` kept."""
        return self.kept.pop(("hidden", thread_id()), None) if self.keeps_input else None

    def ready(self, host: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Sees to it that the attention asks for our function. A forward pre-hook."""
        self.keep(args, kwargs)
        self.name_ours(host)

    def name_ours(self, host: nn.Module) -> None:
        """Puts our function's name into the attention's config, if it isn't there.

        Raises:
            AdapterError: the attention has been switched to one that takes no prefix.
        """
        config: Any = host.config
        name = config._attn_implementation
        if name.startswith(OURS):
            return
        check_implementation(name)
        config._attn_implementation_internal = registered(name)

    def __setstate__(self, state: Any) -> None:
        """Registers our functions where a model comes from another process."""
        super().__setstate__(state)
        for name in KNOWN:
            registered(name)

    def attend(self, call: Answers) -> tuple[Tensor, Tensor | None]:
        """Returns what the attention answers with the active deltas in it."""
        active = self.active
        plan = active.current() if active.overridden else active.plan
        if plan.drop > self.layer:
            return call.run()
        if plan.groups is None:
            return self._changed(plan.steps, call) if self.holds(plan.steps) else call.run()
        parts: list[tuple[RowsAt, Tensor]] = []
        for steps, at in self.mixed_rows(call.query.shape[0], call.query.device):
            with masks.of_rows(at, call.query.shape[0]):
                parts.append((at, self._changed(steps, call.rows(at))[0]))
        return joined(parts), None

    def _changed(
        self, steps: Steps, call: Answers, before: tuple[AttentionDelta, ...] = ()
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the answer of the deltas before and those of some steps together."""
        for at, step in enumerate(steps):
            if isinstance(step, Mean):
                return self._mean(step, steps[at + 1 :], call, before), None
            delta = self._modules.get(step.name if isinstance(step, Fused) else step)
            if delta is not None:
                assert isinstance(delta, AttentionDelta)
                before = (*before, delta)
        return call.answer(before)

    def _mean(
        self, mean: Mean, rest: Steps, call: Answers, before: tuple[AttentionDelta, ...]
    ) -> Tensor:
        if not self.holds((mean,)):
            return self._changed(rest, call, before)[0]
        left = 1.0 - sum(weight for weight, _ in mean.branches)
        parts = [
            weight * self._changed((*steps, *rest), call, before)[0]
            for weight, steps in mean.branches
        ]
        if abs(left) > 1e-9:
            parts.append(left * self._changed(rest, call, before)[0])
        return torch.stack(parts).sum(0)


class Attend:
    """Our attention function over one of transformers' own."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the output, `(B, q, H, D)`, and the weights where there are some."""
        if self.name != "sdpa" and isinstance(attention_mask, Tensor):
            attention_mask = _additive(attention_mask, query.dtype)
        call = Call(module, _own(self.name, module), query, key, value, attention_mask, options)
        deltas = module._modules.get("deltas")
        site = None if deltas is None else deltas._modules.get("attention")
        if not isinstance(site, AttentionSite):
            return call.run()
        if site.keeps_input or site.biases:
            call = replace(call, hidden=site.given(), biases=next(iter(site.biases), None))
        return site.attend(call)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns a mask of what is visible as one to add: eager attention adds True as 1."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(
        ~mask, torch.finfo(dtype).min
    )


def _own(name: str, module: nn.Module) -> Attention:
    """Returns the function that the module would call by itself."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if name == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[name]


def registered(name: str) -> str:
    """Returns the name of our function over the one called `name`, known to transformers."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ours = OURS + name
    if ours not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS.register(ours, Attend(name))
        ALL_MASK_ATTENTION_FUNCTIONS.register(ours, ALL_MASK_ATTENTION_FUNCTIONS[name])
    return ours


def base_name(config: Any) -> str:
    """Returns the attention implementation that the model itself has."""
    return config._attn_implementation.removeprefix(OURS)


def check_implementation(name: str) -> None:
    """Raises AdapterError unless a prefix can be put before the attention called `name`."""
    if name not in KNOWN:
        raise AdapterError(
            f'The model\'s attention is "{name}", which takes no prefix: load the model with '
            'attn_implementation="sdpa", "eager" or "flex_attention".'
        )


def asks_the_registry(module: nn.Module) -> bool:
    """Whether an attention looks its function up, so that ours can be there."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names
