"""One adapter made of several, in their parameters: weighted sums, TIES, DARE, joined ranks.

    linear      theta = sum w_i theta_i
    ties        trimmed to the largest, one sign elected for each entry, mean of those that agree
    dare        each entry kept with chance p and divided by p, then linear (or ties: "dare-ties")
    cat         of LoRA: A's and B's side by side, so that dW = sum w_i dW_i exactly
    svd         of LoRA: the best rank r of sum w_i dW_i

theta of an adapter that holds its own copy of a tensor is its difference from the base. Sources:
Yadav et al. 2023 (TIES, arXiv 2306.01708), Yu et al. 2024 (DARE, arXiv 2311.03099).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from graftune.adapter import Planned, attach_planned, head_grafts
from graftune.anatomy import Anatomy
from graftune.attached import Adapter, plain_model, state_of
from graftune.composition import check_names
from graftune.errors import AdapterError, SettingsError, nearest
from graftune.methods._low_rank import LowRank, Magnitude
from graftune.methods.lora import LoRA
from graftune.sites.base import Graft, is_base
from graftune.sites.parameter import OwnValue

HOW = ("linear", "ties", "dare", "dare-ties", "cat", "svd")
Tensors = dict[str, Tensor]


def combine(
    model: nn.Module,
    members: Sequence[str],
    name: str,
    *,
    how: str = "linear",
    weights: Sequence[float] | None = None,
    density: float = 0.5,
    r: int | None = None,
    seed: int = 0,
) -> Adapter:
    """Attaches a new adapter made of attached ones of the same method, and activates it.

    Args:
        model: what they are attached to.
        members: two or more adapters with the same tensors ("cat", "svd": with the same places).
        name: the new one's.
        how: see above.
        weights: one for each member; None takes 1/n.
        density: share of the entries kept, for TIES and DARE.
        r: rank, for "svd"; None takes the largest of the members'.
        seed: what DARE draws from.

    Raises:
        AdapterError: a member is unknown, or they can't be combined so; the message names both.
        SettingsError: a setting is out of range.
    """
    model = plain_model(model)
    adapters = _members(model, members)
    given = _checked(how, weights, density, len(adapters))
    if how in ("cat", "svd"):
        method, tensors = _low_rank(adapters, given, how, r)
    else:
        states = [adapter.state_dict() for adapter in adapters]
        method = adapters[0].method
        tensors = _combined(adapters, states, given, how, density, seed)
    heads = adapters[0].head_names

    def plan(parts: Anatomy) -> Planned:
        grafts = method.plan_saved(model, parts, tensors)
        return Planned(method, grafts + head_grafts(model, heads, grafts, empty=True), heads)

    made = attach_planned(model, method, name, plan)
    made.load_state_dict(tensors)
    return made


def _members(model: nn.Module, names: Sequence[str]) -> list[Adapter]:
    """Returns the adapters, all of one method."""
    state = state_of(model)
    if isinstance(names, str) or len(names) < 2 or len(set(names)) < len(names):
        raise AdapterError(f"combine takes two or more different adapters, found {names!r}.")
    for name in names:
        check_names(name, state.adapters)
    found = [state.adapters[name] for name in names]
    first = found[0]
    for other in found:
        if other.method.trains_in_place or other.method.fuses:
            raise AdapterError(f'combine can\'t take "{other.name}": {other.method.name}.')
        if type(other.method) is not type(first.method):
            raise AdapterError(
                f'combine takes adapters of one method, found "{first.name}" of '
                f'{first.method.name} and "{other.name}" of {other.method.name}: gt.Average mixes '
                "what they answer."
            )
    return found


def _checked(
    how: str, weights: Sequence[float] | None, density: float, members: int
) -> tuple[float, ...]:
    """Returns the weights."""
    if how not in HOW:
        raise SettingsError(
            f"combine: how is {how!r}, expected one of {', '.join(HOW)}.{nearest(how, HOW)}"
        )
    if not 0 < density <= 1:
        raise SettingsError(f"combine: density is {density!r}, expected more than 0, at most 1.")
    given = [1 / members] * members if weights is None else list(weights)
    if len(given) != members or not all(math.isfinite(weight) for weight in given):
        raise SettingsError(
            f"combine: weights is {weights!r}, expected a finite number for each of {members} "
            "members."
        )
    return tuple(map(float, given))


def _combined(
    adapters: Sequence[Adapter],
    states: Sequence[Mapping[str, Tensor]],
    weights: Sequence[float],
    how: str = "linear",
    density: float = 1.0,
    seed: int = 0,
) -> Tensors:
    """Returns the new adapter's tensors, of those in the members' states."""
    _check_alike(adapters, states)
    bases = _bases(adapters[0])
    draw = torch.Generator().manual_seed(seed)
    found: Tensors = {}
    for name, first in states[0].items():
        if not first.is_floating_point():
            found[name] = first.clone()
            continue
        base = bases.get(name, torch.zeros_like(first)).to(first)
        changes = torch.stack([state[name].to(first) - base for state in states])
        found[name] = base + _mixed(changes, weights, how, density, draw)
    return found


def _mixed(
    changes: Tensor, weights: Sequence[float], how: str, density: float, draw: torch.Generator
) -> Tensor:
    """Returns what changes, `(members, ...)`, are together."""
    if how.startswith("dare"):
        kept = torch.rand(changes.shape, generator=draw).to(changes.device) < density
        changes = changes * kept / density
    elif how == "ties":
        changes = torch.stack([_trimmed(change, density) for change in changes])
    by = torch.tensor(weights, dtype=changes.dtype, device=changes.device)
    weighted = changes * by.reshape(-1, *[1] * (changes.ndim - 1))
    return _elected(weighted, changes, by) if how.endswith("ties") else weighted.sum(0)


def _trimmed(change: Tensor, density: float) -> Tensor:
    """Returns a change with all but its largest entries at zero."""
    flat = change.abs().flatten()
    keep = max(1, round(density * len(flat)))
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[flat.topk(keep).indices] = True
    return change * mask.view(change.shape)


def _elected(weighted: Tensor, changes: Tensor, by: Tensor) -> Tensor:
    """Returns the weighted mean over those that have the elected sign, times the weights' sum.

    The sign is that of the sum; with weights of 1/n that is the disjoint mean of the paper.
    """
    sign = weighted.sum(0).sign()
    agree = (changes.sign() == sign) & (changes != 0)
    shares = by.reshape(-1, *[1] * (changes.ndim - 1)) * agree
    total = shares.sum(0)
    mean = (weighted * agree).sum(0) / torch.where(total == 0, torch.ones_like(total), total)
    return mean * by.sum()


def _check_alike(adapters: Sequence[Adapter], states: Sequence[Mapping[str, Tensor]]) -> None:
    """Raises AdapterError unless all have the same tensors; those that aren't trained equal."""
    first, start = adapters[0], states[0]
    for adapter, state in zip(adapters, states, strict=True):
        pair = f'"{first.name}" and "{adapter.name}" can\'t be combined'
        for name in {**start, **state}:
            shapes = [tuple(s[name].shape) if name in s else None for s in (start, state)]
            if shapes[0] != shapes[1]:
                raise AdapterError(
                    f"{pair}: {name} is {shapes[0] or 'not in the first'} and "
                    f"{shapes[1] or 'not in the second'}."
                )
            same = start[name].is_floating_point() or torch.equal(start[name], state[name])
            if not same:
                raise AdapterError(f"{pair}: {name} differs, and is no number that can be mixed.")


def _bases(adapter: Adapter) -> Tensors:
    """Returns what the tensors of which an adapter holds its own copy are in the base."""
    own = dict(adapter.model.named_parameters())
    return {
        name: own[name].detach() for name in adapter.state_dict() if name in own and is_base(name)
    }


def _low_rank(
    adapters: Sequence[Adapter], weights: Sequence[float], how: str, r: int | None
) -> tuple[LoRA, Tensors]:
    """Returns the settings and tensors of a LoRA whose changes are the members' weighted sum."""
    first = adapters[0].method
    if not isinstance(first, LoRA):
        raise AdapterError(f'combine how="{how}" is for LoRA, found {first.name}.')
    found, others = _factors(adapters), _others(adapters)
    states = [{n: t for n, t in a.state_dict().items() if n in others} for a in adapters]
    tensors = _combined(adapters, states, weights)
    ranks: dict[str, int] = {}
    for key, deltas in found.items():
        parts = list(zip(weights, deltas, strict=True))
        A, B = _joined(parts) if how == "cat" else _truncated(parts, r)
        tensors |= {f"{key}.A": A, f"{key}.B": B}
        ranks[key] = A.shape[0]
    most = max(ranks.values())
    places = {g.place.key: g.place.module for g in adapters[0].grafts}
    odd = {places[key]: rank for key, rank in ranks.items() if rank != most}
    method = dataclasses.replace(
        first, r=most, alpha=None, rslora=False, alpha_pattern=None, rank_pattern=odd or None
    )
    return method, tensors


def _factors(adapters: Sequence[Adapter]) -> dict[str, list[LowRank]]:
    """Returns the members' low-rank changes by place; the same places for all."""
    found: dict[str, list[LowRank]] = {}
    for adapter in adapters:
        for graft in adapter.grafts:
            if isinstance(graft.delta, LowRank):
                _check_plain(adapter, graft)
                found.setdefault(graft.place.key, []).append(graft.delta)
    for key, deltas in found.items():
        if len(deltas) < len(adapters):
            raise AdapterError(
                f"{' and '.join(repr(a.name) for a in adapters)} can't be combined: not all of "
                f"them change {key}."
            )
    return found


def _check_plain(adapter: Adapter, graft: Graft) -> None:
    delta = graft.delta
    assert isinstance(delta, LowRank)
    if isinstance(delta, Magnitude) or delta.A0 is not None or delta.bias is not None:
        raise AdapterError(
            f'"{adapter.name}" has more than A and B at {graft.place.key} (DoRA, a bias, or '
            'a start that isn\'t zero): take how="linear".'
        )


def _others(adapters: Sequence[Adapter]) -> set[str]:
    """Returns the names of tensors that aren't factors: heads' and biases', and nothing else."""
    names: set[str] = set()
    for adapter in adapters:
        for graft in adapter.grafts:
            if isinstance(graft.delta, OwnValue):
                names.add(graft.place.key)
            elif not isinstance(graft.delta, LowRank):
                raise AdapterError(
                    f'"{adapter.name}" changes {graft.place.key} in a way that ranks can\'t be '
                    'joined of: take how="linear".'
                )
    return names


def _joined(parts: Sequence[tuple[float, LowRank]]) -> tuple[Tensor, Tensor]:
    """Returns A and B of which B A is the weighted sum of the members' s B A."""
    A = torch.cat([delta.A.detach() for _, delta in parts], dim=0)
    return A, torch.cat([w * delta.scale * delta.B.detach() for w, delta in parts], dim=1)


def _truncated(parts: Sequence[tuple[float, LowRank]], r: int | None) -> tuple[Tensor, Tensor]:
    """Returns the best A and B of rank r of the weighted sum."""
    first = parts[0][1]
    total = sum(weight * delta.weight_change().detach() for weight, delta in parts)
    assert isinstance(total, Tensor)
    rank = r or max(delta.A.shape[0] for _, delta in parts)
    U, S, V = torch.linalg.svd(total.flatten(1).double(), full_matrices=False)
    rank = min(rank, len(S))
    root = S[:rank].sqrt()
    A = (root[:, None] * V[:rank]).to(first.A.dtype).reshape(rank, *first.A.shape[1:])
    B = (U[:, :rank] * root).to(first.B.dtype)
    return A, B.reshape(B.shape[0], rank, *first.B.shape[2:])
