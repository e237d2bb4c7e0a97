"""The parameter site: while a host runs, some of its own tensors are others.

An entry in a module's instance dictionary is found before its registered parameter, so a hook
before the forward puts the new tensor there and one after it, error or not, takes it away. Names,
state dict and the registered parameters stay as they were.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from graftune.anatomy.packed import is_packed
from graftune.composition import Fused, Mean, Steps
from graftune.errors import AdapterError
from graftune.sites import hosts
from graftune.sites.base import Delta, Graft, ParameterDelta, ParameterPlace, Site, is_base
from graftune.sites.plan import ALWAYS, Plan, RowsAt, joined, taken
from graftune.sites.state import Active


class OwnValue(ParameterDelta):
    """An adapter's own copy of a tensor: theta' itself, trained in its place.

    Alone it is used as it is, bit for bit; after another adapter it adds its difference from the
    base, or takes its place (a head).

    Shapes: value as the tensor it stands for.
    """

    value: nn.Parameter

    def __init__(self, value: Tensor, *, adds: bool = True) -> None:
        super().__init__()
        self.value = nn.Parameter(value)
        self.adds = adds

    def forward(self, value: Tensor | None, base: Tensor | None) -> Tensor:
        """See `ParameterDelta.forward`."""
        if base is None:
            return self.value if value is None else value + self.value
        own = self.value.to(base.dtype)
        if value is base or not self.adds or own.shape != base.shape:
            return own
        assert value is not None
        return value + (own - base)


def own_value(model: nn.Module, name: str, *, empty: bool = False, adds: bool = True) -> Graft:
    """Returns the graft of an adapter's own copy of one of the model's tensors.

    Args:
        model: the base.
        name: the tensor's absolute name.
        empty: leave the copy uninitialised, for a file to fill it.
        adds: see `OwnValue`.

    Raises:
        AdapterError: the tensor is quantised.
    """
    module, _, parameter = name.rpartition(".")
    host = model.get_submodule(module)
    hosts.check_here(host, parameter)
    tensor = host.get_parameter(parameter)
    if is_packed(tensor):
        raise AdapterError(
            f"{name} would be trained, and is quantised: load the base with {module} left as it is "
            f'(llm_int8_skip_modules=["{module}"] of transformers\' quantisation settings), or, if '
            "it is a head, attach with train_head=False."
        )
    options = hosts.delta_options(host, parameter)
    copy = (
        torch.empty_like(tensor, **options) if empty else tensor.detach().to(**options, copy=True)
    )
    return Graft(ParameterPlace(module, parameter), OwnValue(copy, adds=adds))


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the model's own tensors by name, each once, without those of deltas."""
    return {n: p for n, p in model.named_parameters() if is_base(n)}


class ParameterSite(Site):
    """Deltas on a host's own tensors: per adapter a module of deltas by tensor name.

    Args:
        active: the model's shared state.
        owner: the host, where another module reads its tensors and the hooks go there.
        layer: see `Site`.
    """

    def __init__(self, active: Active, owner: nn.Module | None = None, layer: int = ALWAYS) -> None:
        super().__init__(active, layer)
        self.owner = (owner,)
        self.tensors: tuple[str, ...] = ()

    def put(self, adapter: str, tensor: str, delta: Delta) -> None:
        """Adds an adapter's delta of one of the host's tensors."""
        if adapter not in self._modules:
            self._modules[adapter] = nn.Module()
        deltas = self._modules[adapter]
        assert deltas is not None
        deltas._modules[tensor] = delta
        self.tensors = tuple(dict.fromkeys((*self.tensors, tensor)))

    def hook(self, host: nn.Module) -> None:
        """Registers the pair of hooks; the second runs even if the forward fails."""
        self.handles = [
            host.register_forward_pre_hook(self.before),
            host.register_forward_hook(self.after, with_kwargs=True, always_call=True),
        ]

    def unhook(self, host: nn.Module) -> None:
        """See `Site.unhook`."""
        super().unhook(host)
        self.clear(host)

    def clear(self, owner: nn.Module) -> None:
        """Takes other tensors out of the owner's instance dictionary."""
        for name in self.tensors:
            owner.__dict__.pop(name, None)

    def before(self, host: nn.Module, args: Any) -> None:
        """Puts the active tensors in place. The forward pre-hook."""
        active, owner = self.active, self.owner[0] or host
        if active.overridden and not torch.compiler.is_compiling():
            active.turn.take()
        self.clear(owner)  # torch runs no hook after Ctrl-C, so a forward may have left its own
        plan = active.current() if active.overridden else active.plan
        if plan.groups is None and plan.drop <= self.layer:
            for name, value in self.values(plan.steps, owner).items():
                owner.__dict__[name] = value

    def values(
        self, steps: Steps, host: nn.Module, values: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Returns the tensors that some steps make of the host's, by name.

        Args:
            steps: what acts.
            host: whose tensors they are.
            values: what steps before these made of them.
        """
        values = dict(values or {})
        for step in steps:
            if isinstance(step, Mean):
                values = self._mean(step, host, values)
                continue
            deltas = self._modules.get(step.name if isinstance(step, Fused) else step)
            for name, delta in deltas._modules.items() if deltas is not None else ():
                base = host._parameters.get(name)
                assert isinstance(delta, ParameterDelta)
                value = delta.forward(values.get(name, base), base)
                values[name] = value if base is not None else _as_computed(value, host)
        return values

    def _mean(self, mean: Mean, host: nn.Module, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns the tensors as an Average makes them: the mean of each one's values."""
        made = [(w, self.values(s, host, values)) for w, s in mean.branches if self.holds(s)]
        found = dict(values)
        for name in dict.fromkeys(name for _, tensors in made for name in tensors):
            now = values.get(name, host._parameters.get(name))
            mine = [(weight, tensors.get(name, now)) for weight, tensors in made]
            shapes = {tuple(t.shape) for _, t in mine if t is not None}
            if len(shapes) > 1:
                raise AdapterError(
                    f"Average can't mix tensors of different sizes: {name} of a "
                    f"{type(host).__name__} is {' and '.join(map(str, sorted(shapes)))}."
                )
            rest = 1.0 - sum(weight for weight, _ in mine)
            terms = [w * t for w, t in mine if t is not None]
            if now is not None and now.shape == terms[0].shape and abs(rest) > 1e-9:
                terms.append(rest * now)
            found[name] = torch.stack(terms).sum(0) if len(terms) > 1 else terms[0]
        return found

    def after(self, host: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """Takes the tensors away, or answers for each group of rows. The forward hook."""
        self.clear(self.owner[0] or host)
        if not torch.compiler.is_compiling() and self.active.turn.held:
            self.active.turn.drop(self.active.turn.held - 1)
        plan = self.active.current()
        idle = plan.groups is None or plan.drop > self.layer
        if idle or not any(name in self._modules for name in plan.names):
            return None
        if not isinstance(output, Tensor):
            raise AdapterError(
                f"{type(self.owner[0] or host).__name__} reads the tensors "
                f"{', '.join(self.tensors)} itself and gives back several things, so they can't be "
                "others for some rows of a batch only: give each adapter a batch of its own."
            )
        return self._mixed(host, plan, args, kwargs, output)

    def _mixed(
        self, host: nn.Module, plan: Plan, args: Any, kwargs: dict[str, Any], output: Tensor
    ) -> Tensor:
        batch = output.shape[0]
        parts: list[tuple[RowsAt, Tensor | None]] = []
        for steps, at in self.mixed_rows(batch, output.device):
            if not self.holds(steps):
                parts.append((at, None))
                continue
            with self.active.pinned(plan.inner(steps)):
                parts.append((at, host(*_rows(args, at, batch), **_rows(kwargs, at, batch))))
        return _put(output, parts)


def _as_computed(value: Tensor, host: nn.Module) -> Tensor:
    """Returns a tensor that the host lacks in the dtype that its others have."""
    weight = host._parameters.get("weight")
    if weight is None:
        return value
    # bitsandbytes' linears cast the data of a bias in place: what they get is not the parameter.
    return value.clone() if is_packed(weight) else value.to(weight.dtype)


def _rows(given: Any, at: RowsAt, batch: int) -> Any:
    """Returns the arguments of a call with the rows `at` of those that have one per row."""
    if isinstance(given, dict):
        return {key: _rows(value, at, batch) for key, value in given.items()}
    if isinstance(given, tuple):
        return tuple(_rows(value, at, batch) for value in given)
    if isinstance(given, Tensor) and given.ndim and given.shape[0] == batch:
        return taken(given, at)
    return given


def _put(output: Tensor, parts: list[tuple[RowsAt, Tensor | None]]) -> Tensor:
    """Returns the output with some rows as they were computed again."""
    whole = [(at, taken(output, at) if part is None else part) for at, part in parts]
    widths = {tuple(part.shape[1:]) for _, part in whole}
    if len(widths) > 1:
        raise AdapterError(
            f"Rows mixes heads of different sizes, {sorted(widths)}: put rows of one size in a "
            "batch."
        )
    dtype = output.dtype
    return joined([(at, part if part.dtype is dtype else part.to(dtype)) for at, part in whole])
