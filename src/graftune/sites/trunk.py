"""The trunk site: sees every block's hidden state, without gradient, and answers a new last one.

    ids ── E ── block 1 ── .. ── block L ── h_L        the trunk, frozen: no graph, no dropout
           │       │                │
           s ──── side 1 ── .. ── side L ── s_L ── y   what the body answers instead

The site hangs below the body. Its side runs when the trunk has ended, on the arguments that the
trunk was given, so masks, positions and caches are the model's own. Layers of the side's cache are
also the trunk's cache's, which therefore reorders, crops and repeats them with its own.

Of an encoder-decoder, the encoder answers the trunk's states with the side's beside them, and the
decoder tells them apart again: so they pass through `generate`, which repeats rows for beams.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from graftune.composition import Steps
from graftune.errors import AdapterError
from graftune.sites.base import Graft, Site, TrunkDelta, TrunkPlace, branched
from graftune.sites.caches import caches_in
from graftune.sites.kept import Kept, first, thread_id
from graftune.sites.plan import RowsAt, taken
from graftune.sites.side_caches import join, side_cache
from graftune.sites.state import Active

_OWN = frozenset(
    {
        "input_ids",
        "inputs_embeds",
        "past_key_values",
        "use_cache",
        "return_dict",
        "labels",
        "output_hidden_states",
        "output_attentions",
        "encoder_hidden_states",
    }
)
"""Arguments of the body that its side gets others for, or none."""


class Pass(NamedTuple):
    """One pass of the trunk, while it runs."""

    with_gradient: bool
    """Whether its caller makes a graph."""
    training: list[nn.Module]
    """Modules that were in training mode."""
    hidden: list[Tensor]
    """What enters the first block and what leaves each, `(B, T, width)`."""
    encoded: dict[str, Tensor]
    """What each adapter's side of the encoder made."""


class TrunkSite(Site):
    """Side networks beside one body.

    Args:
        active: the model's shared state.
    """

    def __init__(self, active: Active) -> None:
        super().__init__(active)
        self.kept = Kept()
        self.arguments: tuple[str, ...] = ()
        self.feeds_decoder = False
        """Whether the body is an encoder whose states a decoder attends to."""

    def hook(self, host: nn.Module) -> None:
        """Registers `before` and `after`."""
        self.arguments = tuple(inspect.signature(host.forward).parameters)
        after = host.register_forward_hook(
            self.after, prepend=True, with_kwargs=True, always_call=True
        )
        self.handles = [host.register_forward_pre_hook(self.before, with_kwargs=True), after]

    def take(self, model: nn.Module, name: str, graft: Graft) -> None:
        """See `Site.take`: the first adapter also lets the blocks be seen."""
        assert isinstance(graft.place, TrunkPlace)
        if not self._modules:
            self.feeds_decoder = graft.place.feeds_decoder
            blocks = [model.get_submodule(path) for path in graft.place.blocks]
            self.handles.append(blocks[0].register_forward_pre_hook(self.enter, with_kwargs=True))
            self.handles += [block.register_forward_hook(self.leave) for block in blocks]
        super().take(model, name, graft)

    def before(self, host: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Lets the trunk run without gradient and without dropout. A forward pre-hook."""
        names = self._names()
        if not names:
            return None
        given = {**dict(zip(self.arguments, args, strict=False)), **kwargs}
        encoded = self._split(host, given, names)
        alone = self.active.current().groups is None  # other rows may train in the trunk
        quiet = alone and not all(self._delta(name).trunk_dropout for name in names)
        training = [m for m in host.modules() if m.training] if quiet and host.training else []
        self.kept["pass", thread_id()] = Pass(torch.is_grad_enabled(), training, [], encoded)
        if alone:
            torch.set_grad_enabled(False)
        for module in training:
            module.training = False
        return (), given

    def enter(self, block: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Keeps what enters the first block. A forward pre-hook of it."""
        now = self._now()
        if now is not None and not now.hidden:
            now.hidden.append(first(args, kwargs).detach())

    def leave(self, block: nn.Module, args: Any, output: Any) -> None:
        """Keeps what leaves a block. A forward hook of it."""
        now = self._now()
        if now is not None:
            now.hidden.append((output if isinstance(output, Tensor) else output[0]).detach())

    def after(self, host: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """Returns the body's output with the sides' last hidden state. A forward hook."""
        now: Pass | None = self.kept.pop(("pass", thread_id()), None)
        if now is None:
            return None
        torch.set_grad_enabled(now.with_gradient)
        for module in now.training:
            module.training = True
        if output is None:
            return None  # the trunk failed
        given = {**dict(zip(self.arguments, args, strict=False)), **kwargs}
        names, sides = self._names(), dict[str, Tensor]()
        for name in names:
            hidden = now.hidden if name == names[-1] else [*now.hidden]
            sides[name] = self._side(host, name, given, now._replace(hidden=hidden), output)
        last = output[0] if isinstance(output, tuple) else output.last_hidden_state
        if self.feeds_decoder:
            wide = torch.cat([last, *(side.to(last.dtype) for side in sides.values())], -1)
            return _with_last(host, output, wide, pools=False)
        plan = self.active.current()
        if plan.groups is None:
            return _with_last(host, output, self._changed(plan.steps, last.detach(), sides))

        def change(steps: Steps, at: RowsAt, part: Tensor) -> Tensor:
            return self._changed(steps, part, {name: taken(s, at) for name, s in sides.items()})

        return _with_last(host, output, self.mixed(last, change))

    def _side(
        self, host: nn.Module, name: str, given: dict[str, Any], now: Pass, output: Any
    ) -> Tensor:
        """Returns what one adapter's side makes of the trunk's hidden states, `(B, T, narrow)`."""
        delta = self._delta(name)
        passed = {key: value for key, value in given.items() if key not in _OWN}
        passed["return_dict"] = True
        blank = delta.blank(now.hidden[0])
        if "inputs_embeds" in self.arguments:
            passed["inputs_embeds"] = blank
        if name in now.encoded:
            passed["encoder_hidden_states"] = now.encoded[name].to(blank.dtype)
        if "use_cache" in self.arguments or "past_key_values" in self.arguments:
            is_new = given.get("past_key_values") is None
            cache = None if is_new and host.training else next(caches_in(output), None)
            passed["use_cache"] = cache is not None
            if cache is not None:
                length = now.hidden[0].shape[1]
                beside = side_cache(cache, name, delta.config, length)
                made = delta.side_states(now.hidden, {**passed, "past_key_values": beside})
                join(cache, beside)
                return made
        return delta.side_states(now.hidden, passed)

    def _split(self, host: nn.Module, given: dict[str, Any], names: list[str]) -> dict[str, Tensor]:
        """Takes the sides' states out of what a decoder attends to, and returns them by adapter.

        Raises:
            AdapterError: the encoder ran under other adapters.
        """
        states = given.get("encoder_hidden_states")
        if states is None:
            return {}
        widths = [self._delta(name).width for name in names]
        trunk = self._delta(names[0]).trunk_width
        if states.shape[-1] != trunk + sum(widths):
            raise AdapterError(
                f"The decoder attends to {states.shape[-1]} features, expected {trunk} of the "
                f"trunk and {sum(widths)} of {', '.join(names)}: run the encoder under the "
                "adapter that is active now."
            )
        given["encoder_hidden_states"], *sides = states.split([trunk, *widths], -1)
        return dict(zip(names, sides, strict=True))

    def _changed(self, steps: Steps, value: Tensor, sides: dict[str, Tensor]) -> Tensor:
        for step in steps:
            if not isinstance(step, str):
                value = branched(
                    step, value, lambda inner, v: self._changed(inner, v, sides), self.holds
                )
            elif step in sides:
                value = self._delta(step).ended(value, sides[step])
        return value

    def _names(self) -> list[str]:
        """Returns the active adapters that have a side here, in order."""
        return [name for name in self.active.current().names if name in self._modules]

    def _delta(self, name: str) -> TrunkDelta:
        delta = self._modules[name]
        assert isinstance(delta, TrunkDelta)
        return delta

    def _now(self) -> Pass | None:
        return self.kept.get(("pass", thread_id()))


def _with_last(host: nn.Module, output: Any, last: Tensor, *, pools: bool = True) -> Any:
    """Returns a body's answer with another last hidden state, pooled anew where it was pooled."""
    pooler: Any = host._modules.get("pooler")
    if isinstance(output, tuple):
        if pools and pooler is not None and len(output) > 1:
            return last, pooler(last), *output[2:]
        return last, *output[1:]
    made = {**output, "last_hidden_state": last}
    if pools and pooler is not None and made.get("pooler_output") is not None:
        made["pooler_output"] = pooler(last)
    return type(output)(**made)
