"""Which adapters act: switching them, for good or for a while, and what can't act together."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from graftune.attached import Grafts, state_of
from graftune.composition import (
    AdapterDrop,
    Average,
    Composition,
    Fuse,
    Rows,
    Stack,
    check_names,
    copies_of,
    members_of,
    trained_in,
)
from graftune.errors import AdapterError
from graftune.sites.base import EmbeddingDelta, EmbeddingPlace, HiddenPlace, Place
from graftune.sites.entrance import takes_any_length
from graftune.sites.plan import Plan
from graftune.sites.tasks import checked_tasks, tasks_of_rows


def activate(
    model: nn.Module,
    composition: Composition,
    *,
    drop: int | AdapterDrop | None = None,
    tasks: int | Sequence[int] | Tensor | None = None,
) -> None:
    """Makes a composition the one that acts, until the next call; None is the base.

    Args:
        model: what the adapters are attached to.
        composition: a name, None, Stack, Average, Fuse, Parallel or Rows.
        drop: the number of lowest blocks in which nothing acts, or a schedule for training.
        tasks: of adapters with several tasks, which acts: one for all rows or one for each;
            `task_ids` in a forward pass go before it.

    Raises:
        AdapterError: for an unknown name, one that can't act so, a drop beyond the depth, or a task
            that an adapter doesn't have.
    """
    state = state_of(model)
    composition = check_composition(state, composition, drop)
    set_active(state, composition, drop, _tasks(state, composition, tasks))


@contextlib.contextmanager
def using(
    model: nn.Module,
    composition: Composition,
    *,
    drop: int | AdapterDrop | None = None,
    tasks: int | Sequence[int] | Tensor | None = None,
) -> Iterator[None]:
    """Lets a composition act inside the block, for the caller's thread or task alone.

    Args:
        model: what the adapters are attached to.
        composition: as for `activate`.
        drop: as for `activate`.
        tasks: as for `activate`.

    Raises:
        AdapterError: as for `activate`.
    """
    state = state_of(model)
    composition = check_composition(state, composition, drop)
    plan = Plan.of(composition, drop, _tasks(state, composition, tasks))
    with state.active.pinned(plan):
        yield


def check_composition(
    state: Grafts, composition: Composition, drop: int | AdapterDrop | None = None
) -> Composition:
    """Returns a composition with its fusions named.

    Raises:
        AdapterError: it can't act on the model now.
    """
    check_names(composition, state.adapters)
    composition = _with_fusions(state, composition)
    names = members_of(composition)
    _check_drop(state, drop)
    for adapter in state.adapters.values():
        if adapter.method.trains_in_place and names != (adapter.name,):
            raise AdapterError(
                f'Adapter "{adapter.name}" trains the base in place, so it can\'t be switched off: '
                "attach FullFineTuning(keep_base=True) for one that can."
            )
    if copies_of(composition):
        state.copy_rows()
    if isinstance(composition, Rows) or copies_of(composition):
        for name in names:
            _check_rows(state, name)
        _check_prompts(state, composition)
    if state.merged is not None:
        for name in names:
            if name in state.merged.names:
                raise AdapterError(f'Adapter "{name}" is merged: unmerge before you switch it.')
    return composition


def _with_fusions(state: Grafts, composition: Composition) -> Composition:
    """Returns a composition in which every Fuse, and every fusion named alone, says both."""
    if isinstance(composition, str):
        fused = state.adapters[composition].method.fuses
        if not fused:
            return composition
        composition = Fuse(*fused, name=composition)
    if isinstance(composition, Fuse):
        return _named_fusion(state, composition)
    if composition is None:
        return None
    members = [_with_fusions(state, member) for member in composition.members]
    if isinstance(composition, Average):
        return Average(*members, weights=composition.weights)
    return Rows(members) if isinstance(composition, Rows) else type(composition)(*members)


def _named_fusion(state: Grafts, fuse: Fuse) -> Fuse:
    """Returns a Fuse with the name of the attached fusion of its members."""
    for name in members_of(fuse):
        if name not in state.adapters:
            raise AdapterError(
                f'The fusion "{fuse.name}" needs adapter "{name}", which is not attached.'
            )
    fits = [n for n, a in state.adapters.items() if a.method.fuses == fuse.members]
    if fuse.name is None and len(fits) == 1:
        return Fuse(*fuse.members, name=fits[0])
    if fuse.name in fits:
        return fuse
    listed = ", ".join(map(repr, fuse.members))
    if fuse.name is not None:
        raise AdapterError(f'"{fuse.name}" is not a fusion of {listed}, in this order.')
    if fits:
        raise AdapterError(f"Several fusions of {listed} are attached: name one of {fits}.")
    raise AdapterError(
        f"No fusion of {listed} is attached: first "
        f"gt.attach(model, gt.AdapterFusion(members=({listed})), name=...)."
    )


def _check_drop(state: Grafts, drop: int | AdapterDrop | None) -> None:
    schedule = AdapterDrop.of(drop)
    depth = state.anatomy.depth
    most = max(schedule.high, schedule.rest)
    if most > depth:
        raise AdapterError(
            f"drop leaves out the lowest {most} blocks, but this model's stacks have {depth} at "
            "most."
        )


def _check_rows(state: Grafts, name: str) -> None:
    """Raises AdapterError if an adapter can't act on some rows of a batch only."""
    method = state.adapters[name].method
    if not method.mixes_rows:
        raise AdapterError(
            f'Adapter "{name}" is {method.name}, which changes whole weights and can\'t act on '
            "some rows of a batch only."
        )
    once = state.anatomy.once_for_all_rows
    for graft in state.adapters[name].grafts:
        if graft.place.module in once:
            raise AdapterError(
                f'Adapter "{name}" changes {graft.place.module}, which runs once for all rows of a '
                "batch, so it can't act on some of them only."
            )


def _check_prompts(state: Grafts, composition: Composition) -> None:
    """Raises AdapterError if rows have prompts of different lengths, and the model can't."""
    members = composition.members if isinstance(composition, Rows) else copies_of(composition)
    places = dict.fromkeys(g.place for a in state.adapters.values() for g in a.grafts)
    for place in (p for p in places if isinstance(p, EmbeddingPlace | HiddenPlace)):
        lengths = {sum(_prompts(state, member, place)) for member in members}
        if len(lengths) > 1 and not takes_any_length(state.model, place):
            raise AdapterError(
                f"Rows of this {type(state.model).__name__} must have prompts of one length, since "
                f"it takes no positions; found {', '.join(map(str, sorted(lengths)))} virtual "
                "tokens."
            )


def _prompts(state: Grafts, member: Composition, place: EmbeddingPlace | HiddenPlace) -> list[int]:
    """Returns how much each of a member's prompts lengthens a row there: of an Average, one."""
    if isinstance(member, Average):
        return _prompts(state, member.members[0], place)
    if isinstance(member, Stack):
        return [length for part in member.members for length in _prompts(state, part, place)]
    if not isinstance(member, str):
        return []
    return [delta.length for delta in _embedded(state, member, place) if delta.marker is None]


def _embedded(state: Grafts, name: str, place: Place | None = None) -> list[EmbeddingDelta]:
    """Returns what an adapter puts among the embedded tokens, at one place or all."""
    grafts = [g for g in state.adapters[name].grafts if place is None or g.place == place]
    return [graft.delta for graft in grafts if isinstance(graft.delta, EmbeddingDelta)]


def _tasks(
    state: Grafts, composition: Composition, tasks: int | Sequence[int] | Tensor | None
) -> tuple[int, ...]:
    """Returns the tasks of rows, each one that every adapter with several tasks has.

    Raises:
        AdapterError: one is not, or no adapter has tasks.
    """
    if tasks is None:
        return ()
    found = torch.as_tensor(tasks).reshape(-1)
    counts = {
        name: delta.tasks
        for name in members_of(composition)
        for delta in _embedded(state, name)
        if delta.tasks
    }
    if not counts:
        raise AdapterError(
            f"tasks is {tasks!r}, but none of the adapters that act has several tasks: "
            f"{', '.join(members_of(composition)) or 'none acts'}."
        )
    for name, count in counts.items():
        checked_tasks(tasks_of_rows(found, len(found), found.device), count, name)
    return tuple(found.tolist())


def set_active(
    state: Grafts,
    composition: Composition,
    drop: int | AdapterDrop | None = None,
    tasks: tuple[int, ...] = (),
) -> None:
    """Makes a checked composition the one that acts, and lets what it trains have gradients."""
    touched = [*members_of(state.active.plan.composition), *members_of(composition)]
    state.active.set(composition, drop, tasks)
    trained = trained_in(composition)
    for adapter in [state.adapters[name] for name in touched if name in state.adapters]:
        on = adapter.trainable and adapter.name in trained
        for tensor in adapter.parameters():
            tensor.requires_grad_(on)
