"""The sublayer site: sees what enters attention or feed-forward and what leaves it.

    x ──[pre-norm]── F ──[dropout]── h ──┬── delta(h, ...) ──(+)──[post-norm]──
                                         x ──────────────────┘

The site hangs below the module whose output is h; what it reads elsewhere in the block is kept from
there until h comes, by the thread that runs the pass.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from graftune.composition import Fused, Steps
from graftune.sites.base import (
    Bottleneck,
    Graft,
    Seen,
    Site,
    SublayerDelta,
    SublayerPlace,
    branched,
)
from graftune.sites.kept import Kept, first, thread_id
from graftune.sites.plan import ALWAYS, RowsAt
from graftune.sites.state import Active


class SublayerSite(Site):
    """Deltas on one sublayer's answer.

    Args:
        active: the model's shared state.
        layer: see `Site`.
    """

    def __init__(self, active: Active, layer: int = ALWAYS) -> None:
        super().__init__(active, layer)
        self.kept = Kept()
        self.norm: tuple[nn.Module, ...] = ()
        self.reads: set[str] = set()
        self.places: dict[str, SublayerPlace] = {}
        """Each adapter's place, since they may read differently."""

    def hook(self, host: nn.Module) -> None:
        """Registers `after`."""
        self.handles = [host.register_forward_hook(self.after)]

    def move_last(self, host: nn.Module) -> None:
        """Puts `after` behind the host's other hooks, whose answer it takes."""
        hooks: Any = host._forward_hooks  # an OrderedDict, though torch says dict
        hooks.move_to_end(self.handles[0].id)

    def take(self, model: nn.Module, name: str, graft: Graft) -> None:
        """See `Site.take`: also reads what the delta asks for."""
        assert isinstance(graft.place, SublayerPlace)
        assert isinstance(graft.delta, SublayerDelta)
        self.read(model, graft.place, graft.delta.reads)
        super().take(model, name, graft)
        self.places[name] = graft.place

    def read(self, model: nn.Module, place: SublayerPlace, fields: frozenset[str]) -> None:
        """Registers hooks where a new delta reads, unless they are there."""
        for field in sorted(fields - self.reads):
            self.reads.add(field)
            path = getattr(place, field)
            assert path is not None
            if field == "norm":
                self.norm = (model.get_submodule(path),)
                continue
            keep = self.keep_input if field == "input" else self.keep_residual
            module = model.get_submodule(path)
            self.handles.append(module.register_forward_pre_hook(keep, with_kwargs=True))

    def keep_input(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Keeps what the sublayer sees. A forward pre-hook."""
        self._keep("input", args, kwargs)

    def keep_residual(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Keeps what the answer is added to. A forward pre-hook."""
        self._keep("residual", args, kwargs)

    def _keep(self, field: str, args: Any, kwargs: dict[str, Any]) -> None:
        active = self.active
        if active.overridden and active.current().is_inner:
            return  # a module that is run again for some rows
        self.kept[field, thread_id()] = first(args, kwargs)

    def after(self, host: nn.Module, args: Any, output: Any) -> Any:
        """Returns the host's output with the active deltas in it. The forward hook."""
        active = self.active
        plan = active.current() if active.overridden else active.plan
        if plan.is_inner:
            return None
        seen = self._seen() if self.reads else Seen()
        if plan.drop > self.layer:
            return None
        h = output if isinstance(output, Tensor) else output[0]
        new = self._mixed(h, seen) if plan.groups else self._changed(plan.steps, h, seen)
        if new is h:
            return None
        return new if isinstance(output, Tensor) else (new, *output[1:])

    def _seen(self) -> Seen:
        thread = thread_id()
        read, added = (self.kept.pop((field, thread), None) for field in ("input", "residual"))
        return Seen(read, added, self.norm[0] if self.norm else None)

    def _mixed(self, h: Tensor, seen: Seen) -> Tensor:
        plan = self.active.current()

        def change(steps: Steps, at: RowsAt, part: Tensor) -> Tensor:
            if seen.norm is None:
                return self._changed(steps, part, seen.rows(at))
            with self.active.pinned(plan.inner(steps)):  # so that the norm is that of these rows
                return self._changed(steps, part, seen.rows(at))

        return self.mixed(h, change)

    def _changed(self, steps: Steps, h: Tensor, seen: Seen) -> Tensor:
        for step in steps:
            if type(step) is str:
                delta: Any = self._modules.get(step)
                if delta is not None:
                    h = delta.forward(h, seen)
            elif isinstance(step, Fused):
                h = self._fused(step, h, seen)
            else:
                h = branched(step, h, lambda s, v: self._changed(s, v, seen), self.holds)
        return h

    def _fused(self, step: Fused, h: Tensor, seen: Seen) -> Tensor:
        fusion: Any = self._modules.get(step.name)
        if fusion is None:
            return h
        kept = fusion.kept_members()
        return fusion.forward(h, [self._bottleneck(step.branches[i], h, seen) for i in kept])

    def _bottleneck(self, steps: Steps, h: Tensor, seen: Seen) -> Bottleneck:
        """Returns a member's parts: of a Stack, those of its last, on what the others left."""
        here = [name for name in steps if isinstance(name, str) and name in self._modules]
        last = self._modules[here[-1]]
        assert isinstance(last, SublayerDelta)
        return last.bottleneck(self._changed(tuple(here[:-1]), h, seen), seen)
