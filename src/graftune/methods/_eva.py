"""EVA: A starts as the directions in which a linear's inputs vary most (arXiv 2410.07170).

The base runs over some data; for each target the leading principal directions of what enters it are
kept (`Spectrum`), until they hold still or the data end. Ranks may go where a direction explains
more: over all targets together the directions that explain most are taken, up to the sum of the
ranks asked for (section 3.3). Source: Paischer et al. 2024; HF PEFT's code, which is the authors'.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graftune.anatomy import Anatomy, Projection
from graftune.errors import SettingsError
from graftune.methods._batches import batches, evaluating
from graftune.methods._spectrum import Spectrum
from graftune.sites import hosts

Batch = Mapping[str, Any]


@dataclass(frozen=True)
class Target:
    """A linear whose inputs are looked at."""

    module: str
    rank: int
    """As asked for."""
    limit: int
    """The largest it may get."""
    slices: int
    """Projections of it that are changed, each at the module's rank."""
    side: str
    """What its inputs are of: "tokens", "answers" (a decoder's beside an encoder), or "images"."""


def targets(
    model: nn.Module,
    anatomy: Anatomy,
    chosen: Sequence[Projection],
    ranks: Sequence[int],
    rho: float,
) -> list[Target]:
    """Returns the linears among chosen projections of the ranks asked for.

    Raises:
        SettingsError: if there is none.
    """
    found: dict[str, Target] = {}
    for part, rank in zip(chosen, ranks, strict=True):
        host = model.get_submodule(part.module)
        if hosts.kind_of(host, part.parameter) != "linear":
            continue
        fan_in, out = hosts.features(host)
        rows = part.rows or ((0, out),)
        limit = min(round(rho * rank), fan_in, sum(stop - start for start, stop in rows))
        known = found.get(part.module)
        slices = 1 if known is None else known.slices + 1
        limit = limit if known is None else min(limit, known.limit)
        found[part.module] = Target(part.module, rank, limit, slices, _side(anatomy, part))
    if not found:
        raise SettingsError(
            'LoRA: init "eva" starts linears from their inputs, and there is none among the '
            f"targets, such as {chosen[0].path}."
        )
    return list(found.values())


def spectra(
    model: nn.Module, wanted: Sequence[Target], data: Iterable[Batch], tau: float
) -> dict[str, Spectrum]:
    """Returns what the inputs of each target look like, by module.

    Args:
        model: the base, which runs in eval mode and is as it was after.
        wanted: the targets.
        data: batches; those that are needed are taken.
        tau: directions with at least this cosine to what they were a batch before hold still.

    Raises:
        SettingsError: a target saw too few vectors for its rank.
    """
    given = batches(model, data, 'LoRA: init "eva"')
    with evaluating(model), torch.no_grad():
        first = next(given)
        found = _kept(wanted, _same_inputs(model, wanted, first))
        for batch in itertools.chain([first], given):
            _look(model, wanted, found, batch)
            ranks = shared_out(wanted, found)
            if all(found[t.module].has_settled(ranks[t.module], tau) for t in wanted):
                break
    for target in wanted:
        _check_enough(target, found[target.module].count)
    return found


def shared_out(wanted: Sequence[Target], found: Mapping[str, Spectrum]) -> dict[str, int]:
    """Returns each target's rank: the directions that explain most, within the sum asked for."""
    shares = [
        (share, target)
        for target in wanted
        for share in found[target.module].explained()[: target.limit]
    ]
    left = sum(target.rank * target.slices for target in wanted)
    ranks = dict.fromkeys((target.module for target in wanted), 0)
    for _, target in sorted(shares, key=lambda pair: -pair[0]):
        if target.slices <= left:
            left -= target.slices
            ranks[target.module] += 1
    return ranks


def _kept(wanted: Sequence[Target], groups: Mapping[str, tuple[int, ...]]) -> dict[str, Spectrum]:
    """Returns an empty spectrum for each target, one for all of a group."""
    sizes: dict[tuple[int, ...], int] = {}
    for target in wanted:
        calls = groups[target.module]
        sizes[calls] = max(sizes.get(calls, 0), target.limit, target.rank)
    shared = {calls: Spectrum(size) for calls, size in sizes.items()}
    return {target.module: shared[groups[target.module]] for target in wanted}


class _SameInputs:
    """Numbers the tensors that enter modules during one pass, without keeping them alive."""

    def __init__(self) -> None:
        self.seen: list[tuple[weakref.ref[Tensor], int]] = []
        self.calls: dict[nn.Module, list[int]] = {}

    def __call__(self, host: nn.Module, args: tuple[Any, ...]) -> None:
        x: Tensor = args[0]
        same = (n for n, (known, v) in enumerate(self.seen) if known() is x and v == x._version)
        number = next(same, len(self.seen))
        if number == len(self.seen):
            self.seen.append((weakref.ref(x), x._version))
        self.calls.setdefault(host, []).append(number)


def _same_inputs(
    model: nn.Module, wanted: Sequence[Target], batch: Batch
) -> dict[str, tuple[int, ...]]:
    """Returns the numbers of each target's inputs: targets with the same ones see the same."""
    watch = _SameInputs()
    handles = [_host(model, t).register_forward_pre_hook(watch) for t in wanted]
    try:
        model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    never = (-(n + 1) for n in itertools.count())  # what never runs shares with nothing
    return {t.module: tuple(watch.calls.get(_host(model, t), [next(never)])) for t in wanted}


class _Looking:
    """Adds what enters a module, padding left out, to a spectrum."""

    def __init__(self, spectrum: Spectrum, mask: Tensor | None) -> None:
        self.spectrum, self.mask = spectrum, mask

    def __call__(self, host: nn.Module, args: tuple[Any, ...]) -> None:
        self.spectrum.add(real(args[0], self.mask))


def _look(
    model: nn.Module, wanted: Sequence[Target], found: Mapping[str, Spectrum], batch: Batch
) -> None:
    """Runs the base over a batch; the first target of a group looks for all."""
    first: dict[int, Target] = {}
    for target in wanted:
        first.setdefault(id(found[target.module]), target)
    handles = [
        _host(model, target).register_forward_pre_hook(
            _Looking(found[target.module], _mask(batch, target.side))
        )
        for target in first.values()
    ]
    try:
        model(**batch)
    finally:
        for handle in handles:
            handle.remove()


def real(x: Tensor, mask: Tensor | None) -> Tensor:
    """Returns a host's input as vectors, `(n, in)`: those of positions that are no padding.

    A mask of another shape than the input's positions, as where images enter, is left aside.
    """
    vectors = x.reshape(-1, x.shape[-1])
    fits = mask is not None and (x.shape[:-1] == mask.shape or x.shape[:-1] == (mask.numel(),))
    return vectors[mask.reshape(-1)] if mask is not None and fits else vectors


def _mask(batch: Batch, side: str) -> Tensor | None:
    """Returns which positions are real, `(batch, tokens)` bool; None where all are."""
    if side == "answers":
        mask, labels = batch.get("decoder_attention_mask"), batch.get("labels")
        if mask is None and isinstance(labels, Tensor):
            mask = labels != -100
    else:
        mask = batch.get("attention_mask") if side == "tokens" else None
    return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None


def _side(anatomy: Anatomy, part: Projection) -> str:
    beside_encoder = any(stack.kind == "encoder" for stack in anatomy.stacks)
    for stack in anatomy.stacks:
        for span in (span for block in stack.blocks for span in block.spans):
            roles = {p.role for p in span.projections if p.module == part.module}
            if not roles:
                continue
            if stack.kind == "vision":
                return "images"
            reads_encoder = span.kind == "cross-attention" and roles <= {"key", "value"}
            own = stack.kind == "decoder" and beside_encoder and not reads_encoder
            return "answers" if own else "tokens"
    return "tokens"


def _check_enough(target: Target, count: int) -> None:
    if not count:
        raise SettingsError(
            f'LoRA: init "eva": {target.module} never ran on the data, so its inputs are unknown; '
            "leave it out by exclude."
        )
    if count <= target.rank:
        raise SettingsError(
            f'LoRA: init "eva" needs more than r = {target.rank} input vectors to find so many '
            f"directions, but {target.module} saw {count} that are no padding; pass more data, or "
            "set a smaller r."
        )


def _host(model: nn.Module, target: Target) -> nn.Module:
    return model.get_submodule(target.module)


@torch.no_grad()
def start(A: Tensor, spectrum: Spectrum, whiten: bool) -> None:
    """Starts A, `(r, in)`, as the first directions, whitened by the roots of their strengths.

    Raises:
        SettingsError: whitening would divide by zero.
    """
    rank = A.shape[0]
    directions, strengths = spectrum.directions[:rank], spectrum.strengths[:rank]
    if whiten:
        if bool((strengths <= 1e-6 * strengths[0]).any()):
            raise SettingsError(
                f"LoRA: eva_whiten divides by how much inputs vary in {rank} directions, "
                "but some vary in fewer; set a smaller r, or leave it off."
            )
        directions = directions / strengths.sqrt()[:, None]
    A.copy_(directions)
