"""Hanging deltas into a model's tree, and taking them out so that nothing is left."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Mapping

from torch import nn

from graftune.sites import hosts
from graftune.sites.attention import AttentionSite, asks_the_registry
from graftune.sites.base import (
    AttentionPlace,
    Delta,
    Deltas,
    EmbeddingPlace,
    Graft,
    HiddenPlace,
    InfixPlace,
    LinearPlace,
    ParameterPlace,
    Place,
    PositionPlace,
    Site,
    SublayerPlace,
    TrunkPlace,
    base_modules,
)
from graftune.sites.embedding import EmbeddingSite
from graftune.sites.hidden_prompt import HiddenPromptSite
from graftune.sites.infix import InfixSite
from graftune.sites.linear import InputSite, LinearSite
from graftune.sites.parameter import ParameterSite
from graftune.sites.plan import ALWAYS
from graftune.sites.positions import PositionSite
from graftune.sites.softmax import SoftmaxSite
from graftune.sites.state import Active
from graftune.sites.sublayer import SublayerSite
from graftune.sites.trunk import TrunkSite


def insert(
    model: nn.Module,
    active: Active,
    name: str,
    grafts: Iterable[Graft],
    read_by_parent: Collection[str] = (),
    layers: Mapping[str, int] | None = None,
) -> None:
    """Hangs an adapter's deltas below their hosts, and hooks on those that have none yet.

    Args:
        model: the base.
        active: the state that its sites share.
        name: the adapter's.
        grafts: its deltas and their places.
        read_by_parent: modules that never run, whose tensors their parent reads.
        layers: positions of blocks in their stacks, by path.
    """
    aliases = tensor_names(model)
    for graft in grafts:
        place, host = graft.place, model.get_submodule(graft.place.module)
        inside = block_of(place.module, layers or {})
        layer = ALWAYS if inside is None else inside
        graft.delta.train(host.training)
        if not isinstance(place, ParameterPlace):
            site = _site(host, place.site, lambda h=host, p=place, n=layer: _made(active, h, p, n))
            site.take(model, name, graft)
            continue
        tensor = host._parameters.get(place.parameter)
        alone = [(place.module, place.parameter)]
        for alias in aliases.get(id(tensor), alone) if graft.delta.shared else alone:
            twin = model.get_submodule(alias[0])
            unread = alias[0] in read_by_parent
            reader = model.get_submodule(alias[0].rpartition(".")[0]) if unread else None
            owner = twin if unread else None
            site = _site(
                twin, "parameters", lambda o=owner, n=layer: ParameterSite(active, o, n), reader
            )
            assert isinstance(site, ParameterSite)
            site.put(name, alias[1], graft.delta)
    forget_compiled()


def remove(model: nn.Module, name: str) -> None:
    """Takes an adapter's deltas out of the tree, and the sites that it leaves empty."""
    for host in list(model.modules()):
        deltas = host._modules.get("deltas")
        if not isinstance(deltas, Deltas):
            continue
        for key, site in list(deltas._modules.items()):
            assert isinstance(site, Site)
            site._modules.pop(name, None)
            if not site._modules:
                site.unhook(host)
                del deltas._modules[key]
        if not deltas._modules:
            del host._modules["deltas"]
    for host in model.modules():
        deltas = host._modules.get("deltas")
        left = deltas._modules.get("attention") if isinstance(deltas, Deltas) else None
        if isinstance(left, AttentionSite):  # others of the same config took our name away
            left.name_ours(host)


def replace_deltas(
    model: nn.Module, grafts: Iterable[Graft], others: Mapping[Delta, Delta]
) -> None:
    """Puts other deltas in an adapter's places, tied ones too; each takes the old one's mode."""
    for module in list(model.modules()):
        for key, child in module._modules.items():
            if isinstance(child, Delta) and child in others:
                module._modules[key] = others[child].train(child.training)
    for graft in grafts:
        graft.delta = others.get(graft.delta, graft.delta)
    forget_compiled()


def tensor_names(model: nn.Module) -> dict[int, list[tuple[str, str]]]:
    """Returns every place, (module path, tensor name), of each parameter by its id."""
    names: dict[int, list[tuple[str, str]]] = {}
    for path, module in base_modules(model).items():
        for name, tensor in module._parameters.items():
            if tensor is not None:
                names.setdefault(id(tensor), []).append((path, name))
    return names


def forget_compiled() -> None:
    """Lets compiled models see new hooks: dynamo looks at hooks only when it traces."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        dynamo.reset()


def block_of(path: str, positions: Mapping[str, int]) -> int | None:
    """Returns the position of the block that a module lies in; None outside blocks."""
    while path:
        if path in positions:
            return positions[path]
        path = path.rpartition(".")[0]
    return None


def _made(active: Active, host: nn.Module, place: Place, layer: int) -> Site:
    """Returns a new site for a place that isn't a tensor's."""
    if isinstance(place, SublayerPlace):
        return SublayerSite(active, layer)
    if isinstance(place, AttentionPlace):
        kind = AttentionSite if asks_the_registry(host) else SoftmaxSite
        return kind(active, layer)
    if isinstance(place, EmbeddingPlace):
        return EmbeddingSite(active)
    if isinstance(place, HiddenPlace):
        return HiddenPromptSite(active)
    if isinstance(place, PositionPlace):
        return PositionSite(active)
    if isinstance(place, TrunkPlace):
        return TrunkSite(active)
    if isinstance(place, InfixPlace):
        return InfixSite(active)
    assert isinstance(place, LinearPlace)
    if place.side == "input":
        return InputSite(active, layer)
    return LinearSite(active, place.rows, hosts.home(host, next(host.parameters())), layer)


def _site(
    host: nn.Module, key: str, make: Callable[[], Site], reader: nn.Module | None = None
) -> Site:
    deltas = host._modules.get("deltas")
    if deltas is None:
        deltas = Deltas()
        host.add_module("deltas", deltas)
    site = deltas._modules.get(key)
    if site is None:
        site = make()
        deltas._modules[key] = site
        site.hook(host if reader is None else reader)
        last = deltas._modules.get("sublayer")
        if isinstance(last, SublayerSite):
            last.move_last(host)
    assert isinstance(site, Site)
    return site
