"""An adapter's life: attach, activate, save, detach.

`merging.py` writes changes into the weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from graftune.activating import activate as activate
from graftune.activating import check_composition, set_active
from graftune.activating import using as using
from graftune.anatomy import Anatomy
from graftune.attached import STATE, Adapter, Grafts, adapters, anatomy_of, plain_model, state_of
from graftune.composition import check_names, members_of
from graftune.errors import AdapterError, SettingsError, nearest
from graftune.methods.base import HeadChoice, Method
from graftune.sites import hosts, quantised
from graftune.sites.base import Graft, ParameterPlace, is_base
from graftune.sites.parameter import own_value
from graftune.sites.placing import forget_compiled, insert, remove
from graftune.sites.plan import Plan

__all__ = [
    "Adapter",
    "Planned",
    "activate",
    "adapters",
    "attach",
    "attach_planned",
    "detach",
    "head_grafts",
    "head_names",
    "plain_model",
    "state_of",
    "using",
]


def attach(
    model: nn.Module,
    method: Method,
    name: str = "default",
    *,
    seed: int | None = None,
    empty: bool = False,
    data: Iterable[Mapping[str, Tensor]] | None = None,
) -> Adapter:
    """Attaches a method to a model under a name, and activates it for training.

    The base is frozen; the newly initialised head gets values of its own in the adapter.

    Args:
        model: any `PreTrainedModel`; its class, names and tensors stay as they are.
        method: settings such as `LoRA(r=8)`.
        name: without "/" or "."; what the adapter is saved and switched by.
        seed: makes the initial values reproducible, leaving the global generator alone.
        empty: leave tensors uninitialised, for a file to fill them.
        data: batches that some methods look at first (`method.needs_data`): dictionaries of what
            the model's forward takes, labels among them. A base on the meta device, which has no
            numbers to look at data with, needs none.

    Raises:
        AdapterError: for a name that is taken or can't be one.
        SettingsError: for settings that don't fit the model, or data that a method lacks.
        AnatomyError: for targets that name nothing in it.
    """
    model = plain_model(model)
    if not isinstance(method, Method):
        raise SettingsError(f"attach takes a method such as gt.LoRA(r=8), found {method!r}.")
    empty = empty or (method.needs_data and any(p.is_meta for p in model.parameters()))
    if method.needs_data and data is None and not empty:
        raise SettingsError(
            f"{method.name} looks at data before it trains: pass batches, as in "
            "gt.attach(model, method, data=[{...}, ...])."
        )

    def plan(parts: Anatomy) -> Planned:
        chosen = method
        with _seeded(seed):
            if method.needs_data and data is not None and not empty:
                with _base_alone(model):
                    chosen, grafts = method.plan_on(model, parts, data)
            else:
                grafts = method.plan(model, parts, empty=empty)
            heads = head_names(model, parts, method.train_head)
            if not method.trains_in_place:
                grafts = grafts + head_grafts(model, heads, grafts, empty=empty)
        return Planned(chosen, grafts, heads)

    return attach_planned(model, method, name, plan)


@contextlib.contextmanager
def _base_alone(model: nn.Module) -> Iterator[None]:
    """Lets no adapter act inside the block, for the caller's thread or task alone."""
    state: Grafts | None = model.__dict__.get(STATE)
    with state.active.pinned(Plan.of(None)) if state is not None else contextlib.nullcontext():
        yield


class Planned(NamedTuple):
    """What is about to be attached."""

    method: Method
    grafts: list[Graft]
    heads: tuple[str, ...]
    """Paths of the head modules of which it has its own values."""


def attach_planned(
    model: nn.Module,
    method: Method,
    name: str,
    plan: Callable[[Anatomy], Planned],
) -> Adapter:
    """Attaches what `plan` makes of a model's anatomy.

    A file's adapter is attached so, since it names its places one by one.

    Raises:
        AdapterError: for a name that is taken or can't be one; and what `plan` raises.
    """
    model = plain_model(model)
    _check_name(name)
    state: Grafts | None = model.__dict__.get(STATE)
    if state is not None:
        _check_place(state, method, name)
    parts = anatomy_of(model)
    planned = plan(parts)
    _check_offloaded(model, planned)
    state = state or _install(model, parts)
    adapter = Adapter(name, planned.method, model, planned.grafts, planned.heads)
    state.adapters[name] = adapter
    if any(graft.delta.needs_masks for graft in adapter.grafts):
        state.watch_masks()
    insert(model, state.active, name, adapter.grafts, parts.read_by_parent, parts.positions)
    set_active(state, check_composition(state, name))
    state.tell_transformers()
    return adapter


def _check_offloaded(model: nn.Module, planned: Planned) -> None:
    """Raises AdapterError where accelerate keeps weights elsewhere that are read or changed."""
    if planned.method.trains_in_place:
        for host in model.modules():
            hosts.check_here(host, "weight")
    for graft in planned.grafts:
        host = model.get_submodule(graft.place.module)
        reads = isinstance(graft.place, ParameterPlace)
        if reads or any(tensor.is_meta for tensor in graft.delta.parameters()):
            hosts.check_here(host, getattr(graft.place, "parameter", "weight"))


def detach(model: nn.Module, name: str) -> None:
    """Takes an adapter off; with the last one the model is as it was, module tree and all.

    Raises:
        AdapterError: for an unknown name, or an adapter that is active, merged or trained in place.
    """
    model = plain_model(model)
    state = state_of(model)
    check_names(name, state.adapters)
    adapter = state.adapters[name]
    _check_removable(state, adapter)
    remove(model, name)
    del state.adapters[name]
    state.tell_transformers()
    if not state.adapters:
        _uninstall(model, state)
    forget_compiled()


def head_names(model: nn.Module, parts: Anatomy, choice: HeadChoice) -> tuple[str, ...]:
    """Returns the paths of the heads that a `train_head` setting asks for.

    Raises:
        SettingsError: if it names a module the model doesn't have.
    """
    if choice is None:
        return parts.new_heads
    if isinstance(choice, bool):
        return parts.heads if choice else ()
    every = dict(model.named_modules())
    found: list[str] = []
    for name in choice:
        hits = [path for path in every if path == name or path.endswith(f".{name}")]
        if not hits:
            known = [*parts.heads, *every]
            raise SettingsError(
                f'train_head names "{name}", which {type(model).__name__} has not; its heads are '
                f"{', '.join(parts.heads) or 'none'}.{nearest(name, known)}"
            )
        found += hits
    return tuple(dict.fromkeys(found))


def head_grafts(
    model: nn.Module, heads: Iterable[str], taken: Iterable[Graft], *, empty: bool
) -> list[Graft]:
    """Returns grafts of the heads' tensors that `taken` doesn't have.

    Args:
        model: the base.
        heads: paths of head modules.
        taken: the method's own grafts.
        empty: leave them uninitialised, for a file to fill them.
    """
    have = {graft.place.key for graft in taken}
    names = [
        f"{h}.{n}" if h else n for h in heads for n, _ in model.get_submodule(h).named_parameters()
    ]
    names = [name for name in dict.fromkeys(names) if is_base(name) and name not in have]
    return [own_value(model, name, empty=empty, adds=False) for name in names]


def _check_name(name: str) -> None:
    if (
        not isinstance(name, str)
        or not name
        or any(c in name for c in "/\\.")
        or name.strip() != name
    ):
        raise AdapterError(
            f'An adapter\'s name is text without "/", "\\", "." or outer blanks, found {name!r}.'
        )


def _check_place(state: Grafts, method: Method, name: str) -> None:
    if name in state.adapters:
        raise AdapterError(
            f'An adapter named "{name}" is attached already; detach it, or take another name.'
        )
    for adapter in state.adapters.values():
        if adapter.method.trains_in_place or method.trains_in_place:
            here = adapter.name if adapter.method.trains_in_place else name
            raise AdapterError(
                f'"{here}" trains the base in place, so no other adapter can be beside it: attach '
                "FullFineTuning(keep_base=True) for one that can share the model."
            )


def _check_removable(state: Grafts, adapter: Adapter) -> None:
    if adapter.method.trains_in_place:
        raise AdapterError(
            f'Adapter "{adapter.name}" trained the base in place, so there is nothing to take off: '
            "load the base anew, or attach FullFineTuning(keep_base=True)."
        )
    if state.merged is not None and adapter.name in state.merged.names:
        raise AdapterError(f'Adapter "{adapter.name}" is merged: unmerge before you detach it.')
    for other in state.adapters.values():
        if adapter.name in {n for member in other.method.fuses for n in members_of(member)}:
            raise AdapterError(
                f'Adapter "{adapter.name}" is a member of the fusion "{other.name}": detach that '
                "first."
            )
    if adapter.name in members_of(state.active.current().composition):
        raise AdapterError(
            f'Adapter "{adapter.name}" is active: gt.activate(model, None) before you detach it.'
        )


def _install(model: nn.Module, parts: Anatomy) -> Grafts:
    state = Grafts(model, parts)
    model.__dict__[STATE] = state
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    quantised.keep_exact(model)
    body = getattr(model, "base_model", model)
    for module in dict.fromkeys((model, body)):
        state.handles.append(module.register_forward_pre_hook(state.prepare))
    return state


def _uninstall(model: nn.Module, state: Grafts) -> None:
    for handle in state.handles:
        handle.remove()
    for name in state.thawed:
        model.get_parameter(name).requires_grad_(True)
    del model.__dict__[STATE]


@contextlib.contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    if seed is None:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
