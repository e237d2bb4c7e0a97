"""Writing adapters' changes into the weights, and taking them out again exactly."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from graftune.activating import check_composition
from graftune.anatomy.packed import is_packed
from graftune.attached import Adapter, Grafts, plain_model, state_of
from graftune.composition import Composition, Stack, members_of
from graftune.errors import AdapterError, SettingsError, nearest
from graftune.sites import hosts, quantised
from graftune.sites.base import (
    AttentionDelta,
    Delta,
    Graft,
    InputDelta,
    LinearDelta,
    LinearPlace,
    ParameterDelta,
    SublayerDelta,
)
from graftune.sites.placing import forget_compiled, insert, remove, tensor_names


@dataclass
class Merged:
    """What `unmerge` needs: the originals of every tensor that was changed."""

    names: tuple[str, ...]
    before: Composition
    originals: list[tuple[nn.Module, str, nn.Parameter, Tensor]] = field(default_factory=list)
    untied: bool = False
    opened: quantised.OpenedModel | None = None


def merge(
    model: nn.Module,
    adapters: Composition,
    *,
    quantized: Literal["dequantize", "requantize"] | None = None,
) -> None:
    """Writes an adapter (or a Stack) into the weights; the model is then a plain one.

    The originals are kept, so that `unmerge` is exact. Sums are made in float32 and cast back.

    Args:
        model: with adapters.
        adapters: what to merge.
        quantized: what becomes of a base that is quantised. "dequantize": all its linears become
            plain ones of the dtype that it computes in, and the sum is kept whole; "requantize":
            the sums are quantised as the weights were, which loses much of a small change.

    Raises:
        AdapterError: if something is merged already, or a method or host can't be merged; or a
            change is of a quantised weight and `quantized` is None.
        SettingsError: `quantized` is something else.
    """
    model = plain_model(model)
    state = state_of(model)
    _check_choice(quantized)
    _check(state, adapters)
    chosen = [state.adapters[name] for name in members_of(adapters)]
    if quantized is None:
        _check_plain(model, chosen)
    opened = quantised.open_model(model) if quantized == "dequantize" else None
    try:
        changed = _changed_tensors(model, chosen)
    except BaseException:
        if opened is not None:
            opened.close(model)
        raise
    record = Merged(tuple(a.name for a in chosen), state.active.plan.composition, opened=opened)
    for adapter in chosen:
        remove(model, adapter.name)
    for (path, name), value in changed.items():
        _replace(model, record, path, name, value)
    if record.untied:
        model.config.tie_word_embeddings = False  # type: ignore[union-attr]
    state.merged = record
    state.active.set(None)
    state.tell_transformers()
    forget_compiled()


def unmerge(model: nn.Module) -> None:
    """Puts the original weights back, bit for bit, and lets the adapters act beside them again.

    Raises:
        AdapterError: if nothing is merged.
    """
    model = plain_model(model)
    state = state_of(model)
    record = state.merged
    if record is None:
        raise AdapterError("Nothing is merged into this model.")
    for host, name, parameter, data in record.originals:
        parameter.data = data.to(parameter.device)
        if is_packed(parameter):
            quantised.put(host, parameter)
        host._parameters[name] = parameter
    if record.opened is not None:
        record.opened.close(model)
    if record.untied:
        model.config.tie_word_embeddings = True  # type: ignore[union-attr]
    for adapter_name in record.names:
        adapter = state.adapters[adapter_name]
        for graft in adapter.grafts:
            graft.delta.to(next(model.get_submodule(graft.place.module).parameters()).device)
        parts = state.anatomy
        insert(
            model, state.active, adapter_name, adapter.grafts, parts.read_by_parent, parts.positions
        )
    state.merged = None
    state.active.set(record.before)
    state.tell_transformers()


def _check_choice(quantized: str | None) -> None:
    choices = ("dequantize", "requantize")
    if quantized is not None and quantized not in choices:
        raise SettingsError(
            f'quantized is {quantized!r}; expected "dequantize", "requantize" or None.'
            f"{nearest(str(quantized), choices)}"
        )


def _check_plain(model: nn.Module, adapters: list[Adapter]) -> None:
    """Raises where a change is of a quantised weight."""
    for adapter in adapters:
        for graft in adapter.grafts:
            place = graft.place
            if place.parameter == "weight" and hosts.is_quantised(
                model.get_submodule(place.module)
            ):
                raise AdapterError(
                    f'Adapter "{adapter.name}" changes {place.module}, whose weight is quantised: '
                    'merge with quantized="dequantize" for a plain model (in the command line '
                    '--dequantize), or with quantized="requantize", which loses some of the '
                    "change; nothing was changed."
                )


def _check(state: Grafts, adapters: Composition) -> None:
    if state.merged is not None:
        raise AdapterError(
            f"{' and '.join(state.merged.names)} is merged already: unmerge before you merge again."
        )
    names = adapters.members if isinstance(adapters, Stack) else (adapters,)
    if not all(isinstance(name, str) for name in names):
        raise AdapterError(
            f"merge takes an adapter's name or a Stack of names, found {adapters!r}."
        )
    check_composition(state, adapters)
    for name in members_of(adapters):
        if state.adapters[name].method.trains_in_place:
            raise AdapterError(f'Adapter "{name}" trains the base in place: it is merged as it is.')


def _changed_tensors(model: nn.Module, adapters: list[Adapter]) -> dict[tuple[str, str], Tensor]:
    """Returns the new value of every tensor that the adapters change, by (module, name).

    Tensor by tensor, so that one at a time is held in float32, and rounded once.
    """
    changed: dict[tuple[str, str], Tensor] = {}
    steps: dict[tuple[str, str], list[tuple[Adapter, Graft]]] = {}
    for adapter in adapters:
        for graft in adapter.grafts:
            if not graft.delta.follows:
                key = (graft.place.module, graft.place.parameter)
                steps.setdefault(key, []).append((adapter, graft))
            if isinstance(graft.delta, SublayerDelta | AttentionDelta):
                raise AdapterError(
                    f'Adapter "{adapter.name}" can\'t be merged: {adapter.method.name} is not '
                    "linear, so no weight does what it does."
                )
    with torch.no_grad():
        # As the host runs: its own tensors first, biases before what scales its output.
        for key in sorted(steps, key=lambda key: key[1] != "bias"):
            for adapter, graft in sorted(steps[key], key=_turn):
                _add(model, adapter, graft, changed)
            if key[1] != "bias":
                changed[key] = _narrow(model, key, changed[key])
        return {key: _narrow(model, key, value) for key, value in changed.items()}


def _turn(step: tuple[Adapter, Graft]) -> int:
    """Returns when a change takes part: the tensor's, the output's, last the input's.

    A changed input is what every other change at the host sees, so it comes last on the weight.
    """
    delta = step[1].delta
    return 0 if isinstance(delta, ParameterDelta) else 2 if isinstance(delta, InputDelta) else 1


def _narrow(model: nn.Module, key: tuple[str, str], value: Tensor) -> Tensor:
    host = model.get_submodule(key[0])
    old = host._parameters[key[1]]
    assert old is not None
    if is_packed(old):
        return value if is_packed(value) else quantised.packed(host, value)
    return value.to(old.dtype).contiguous()


def _add(
    model: nn.Module, adapter: Adapter, graft: Graft, changed: dict[tuple[str, str], Tensor]
) -> None:
    place, delta = graft.place, graft.delta
    host = model.get_submodule(place.module)
    key = (place.module, place.parameter)
    base = host._parameters.get(place.parameter)
    if base is None:
        raise AdapterError(
            f'Adapter "{adapter.name}" can\'t be merged: {place.module} has no {place.parameter} '
            "to write into, and a new one would not be in the base model's class."
        )
    hosts.check_here(host, place.parameter)
    now = changed.get(key)
    if now is None and is_packed(base):
        now = quantised.numbers(host)
    if isinstance(delta, ParameterDelta):
        wide = base.detach() if now is None else now
        with _at_rest(delta):
            changed[key] = delta.forward(wide, wide if now is None else base).detach().clone()
        return
    assert isinstance(place, LinearPlace)
    changed[key] = _merged_weight(host, place, delta, base if now is None else now)
    if isinstance(delta, LinearDelta):
        _merge_bias(adapter, place, delta, host._parameters.get("bias"), changed)


@contextlib.contextmanager
def _at_rest(delta: Delta) -> Iterator[None]:
    """Keeps noise and dropout, which are training's, out of what is merged."""
    training = delta.training
    delta.eval()
    try:
        yield
    finally:
        delta.train(training)


def _merged_weight(host: nn.Module, place: LinearPlace, delta: Delta, weight: Tensor) -> Tensor:
    wide = hosts.oriented(
        host, weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    )
    if place.rows is None:
        wide = delta.merged(wide, host)
    else:
        wide = wide.clone()
        at = hosts.row_index(place.rows, wide.device)
        wide[at] = delta.merged(wide[at], host)
    return hosts.oriented(host, wide)


def _merge_bias(
    adapter: Adapter,
    place: LinearPlace,
    delta: LinearDelta,
    bias: Tensor | None,
    changed: dict[tuple[str, str], Tensor],
) -> None:
    key, at = (place.module, "bias"), None
    now = None if bias is None else changed.get(key, bias.detach())
    if now is not None and place.rows is not None:
        at = hosts.row_index(place.rows, now.device)
    change = delta.bias_change(now if now is None or at is None else now[at])
    if change is None:
        return
    if now is None:
        raise AdapterError(
            f'Adapter "{adapter.name}" can\'t be merged: it adds a bias, and {place.module} has '
            "none to write it into."
        )
    changed[key] = now + change if at is None else now.index_add(0, at, change.to(now.dtype))


def _replace(model: nn.Module, record: Merged, path: str, name: str, value: Tensor) -> None:
    """Gives a host its new tensor: in place where it is alone or all its ties change with it."""
    host = model.get_submodule(path)
    parameter = host._parameters[name]
    assert parameter is not None
    if is_packed(parameter):
        record.originals.append((host, name, quantised.taken(host), parameter.data))
        assert isinstance(value, nn.Parameter)
        quantised.put(host, value)
        return
    if name != "weight" or record.opened is None or not record.opened.holds(host):
        record.originals.append((host, name, parameter, parameter.data))
    ties = tensor_names(model)[id(parameter)]
    if len(ties) > 1 and name == "weight" and _splits_tie(model, record, ties):
        host._parameters[name] = nn.Parameter(value, requires_grad=False)
        record.untied = True
    else:
        parameter.data = value


def _splits_tie(model: nn.Module, record: Merged, ties: list[tuple[str, str]]) -> bool:
    """Whether the change is meant for one of several tied hosts only."""
    state = state_of(model)
    for name in record.names:
        for graft in state.adapters[name].grafts:
            same = (graft.place.module, graft.place.parameter) in ties
            tied = isinstance(graft.delta, ParameterDelta) and graft.delta.shared
            if same and (graft.delta.follows or tied):
                return False
    return True
