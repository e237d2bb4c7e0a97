"""The linear site: sees x and y = Wx + b, answers a new x or a new y, maybe some outputs only."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from graftune.composition import Steps
from graftune.sites.base import Site, branched
from graftune.sites.hosts import row_index
from graftune.sites.plan import ALWAYS, taken
from graftune.sites.state import Active


class LinearSite(Site):
    """Deltas on the output of one host.

    Where a host has several such sites (slices of it, and the whole), the first runs the deltas of
    all, adapter by adapter, so that the order is that of the adapters and not of the hooks.

    Args:
        active: the model's shared state.
        rows: half-open ranges of output features that the deltas see; None for all.
        layer: see `Site`.
    """

    index: Tensor | None
    sites: tuple[LinearSite, ...]
    """Those whose deltas this one runs, itself the first; none where another does."""

    def __init__(
        self,
        active: Active,
        rows: tuple[tuple[int, int], ...] | None,
        device: torch.device,
        layer: int = ALWAYS,
    ) -> None:
        super().__init__(active, layer)
        index = None if rows is None else row_index(rows, device)
        self.register_buffer("index", index, persistent=False)
        self.sites = (self,)

    def hook(self, host: nn.Module) -> None:
        """Registers `after`, ahead of a parameter site's clean-up."""
        self.handles = [host.register_forward_hook(self.after, prepend=True)]
        _share(_output_sites(host))

    def unhook(self, host: nn.Module) -> None:
        """See `Site.unhook`."""
        super().unhook(host)
        _share([site for site in _output_sites(host) if site is not self])

    def after(self, host: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
        """Returns the host's output with the active deltas in it. The forward hook."""
        active = self.active
        plan = active.current() if active.overridden else active.plan
        if plan.drop > self.layer:
            return y
        if plan.groups is None:
            return self._changed(plan.steps, args[0], y, host)
        x = args[0]
        return self.mixed(y, lambda steps, at, some: self._changed(steps, taken(x, at), some, host))

    def acts(self, steps: Steps) -> bool:
        """See `Site.acts`: it runs the deltas of all sites of the host."""
        return any(site.holds(steps) for site in self.sites)

    def _changed(self, steps: Steps, x: Tensor, y: Tensor, host: nn.Module) -> Tensor:
        sites = self.sites
        for step in steps:
            if type(step) is not str:
                y = branched(step, y, lambda s, v: self._changed(s, x, v, host), self.acts)
                continue
            for site in sites:
                delta: Any = site._modules.get(step)
                if delta is None:
                    continue
                index = site._buffers["index"]  # not by attribute: a hot path
                if index is None:
                    y = delta.forward(x, y, host)
                else:
                    part = delta.forward(x, y.index_select(-1, index), host)
                    y = y.index_copy(-1, index, part)
        return y


def _output_sites(host: nn.Module) -> list[LinearSite]:
    sites = host.get_submodule("deltas").children()
    return [site for site in sites if isinstance(site, LinearSite)]


def _share(sites: list[LinearSite]) -> None:
    """Lets the first of a host's output sites run the deltas of all."""
    for site in sites:
        site.sites = tuple(sites) if site is sites[0] else ()


class InputSite(Site):
    """Deltas on the input of one host, before all that happens at its output."""

    def hook(self, host: nn.Module) -> None:
        """Registers `before`."""
        self.handles = [host.register_forward_pre_hook(self.before)]

    def before(self, host: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Returns the host's arguments with its input as the active deltas leave it."""
        active, x = self.active, args[0]
        plan = active.current() if active.overridden else active.plan
        if plan.drop > self.layer:
            return args
        if plan.groups is None:
            return (self._changed(plan.steps, x, host), *args[1:])
        x = self.mixed(x, lambda steps, _at, some: self._changed(steps, some, host))
        return (x, *args[1:])

    def _changed(self, steps: Steps, x: Tensor, host: nn.Module) -> Tensor:
        for step in steps if len(steps) < 2 else self._ordered(steps):
            if type(step) is not str:
                x = branched(step, x, lambda s, v: self._changed(s, v, host), self.holds)
                continue
            delta: Any = self._modules.get(step)
            if delta is not None:
                x = delta.forward(x, host)
        return x

    def _ordered(self, steps: Steps) -> Steps:
        """Returns steps with those that undo something last, in reverse."""
        undo = [s for s in steps if getattr(self._modules.get(cast(str, s)), "undoes", False)]
        return (*(s for s in steps if s not in undo), *reversed(undo)) if undo else steps
