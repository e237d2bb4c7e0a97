"""What trained gates do on data: how far open each is, in every layer and member.

reading = gt.gates(model, "task", batches)["encoder.layer.0.attention.self"]
reading.member, reading.mean, reading.spread      "PrefixTuning", (gates,), (gates,)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graftune.activating import using
from graftune.anatomy import Anatomy
from graftune.attached import Adapter, state_of
from graftune.composition import check_names
from graftune.errors import AdapterError, SettingsError
from graftune.methods._batches import evaluating
from graftune.methods._gate import Gate
from graftune.methods._hybrid import Hybrid
from graftune.methods.base import HeatMap
from graftune.methods.llamaadapter import GatedPrompt
from graftune.sites.base import Graft
from graftune.sites.placing import block_of


@dataclass(frozen=True)
class GateReading:
    """How far one gate is open. Shapes: mean, spread (gates,): 1, of a prefix up to 2, or heads."""

    member: str
    """The method that it is of, or in a UniPELT or Union the part's."""
    mean: Tensor
    """Over the examples; of a gate of single tokens each example's mean over its real tokens."""
    spread: Tensor
    """The standard deviation over the examples; 0 of a gate that doesn't see them."""
    examples: int


def gates(
    model: nn.Module, name: str, data: Iterable[Mapping[str, Tensor]], *, drop: int = 0
) -> dict[str, GateReading]:
    """Returns how far each gate of an adapter is open on data, in eval mode.

    Gates of UniPELT, of `gate=` in any method, and LLaMA-Adapter's, which don't see the input.

    Args:
        model: what the adapter is attached to.
        name: the adapter's.
        data: batches of what the model's forward takes; padding is left out.
        drop: lowest blocks in which nothing acts, so that there is nothing to read.

    Returns:
        Each gate's reading, by its place.

    Raises:
        AdapterError: the adapter has no gates, or a mask doesn't fit what a gate sees.
        SettingsError: there is no batch, or all gates are dropped.
    """
    adapter = _gated(model, name)
    seen: dict[str, list[Tensor]] = {}
    with evaluating(model), using(model, name, drop=drop), torch.no_grad():
        for batch in data:
            for place, values in _of_batch(model, adapter, batch, drop).items():
                seen.setdefault(place, []).append(values)
    if not seen:
        raise SettingsError(
            f"gates needs one batch or more and gates that act, found none (drop is {drop})."
        )
    members = {graft.place.key: _member(adapter, graft) for graft in adapter.grafts}
    return {place: _reading(members[place], torch.cat(parts)) for place, parts in seen.items()}


def gate_maps(readings: Mapping[str, GateReading], anatomy: Anatomy) -> list[HeatMap]:
    """Returns drawings of readings by block: the means, and the spreads where there are some."""
    one = next(iter(readings.values()))
    note = f"Over {one.examples:,} examples, from 0 (shut) to 1 (open)."
    drawn: dict[str, Callable[[GateReading], float]] = {
        "How far gates are open": lambda found: float(found.mean.mean()),
        "Spread of gates over examples": lambda found: float(found.spread.mean()),
    }
    maps: list[HeatMap] = []
    for title, value in drawn.items():
        values = {f"{place}: {found.member}": value(found) for place, found in readings.items()}
        if any(values.values()):
            maps.append(HeatMap.by_block(title, values, anatomy, note))
    return maps


def has_gates(adapter: Adapter) -> bool:
    """Whether an adapter has gates that can be read."""
    return bool(_opened(adapter) or _fixed(adapter, 0))


class _Recorder:
    """Notes a gate's values in one pass.

    Args:
        rows: of the batch.
        mask: which tokens are real, `(rows, tokens)`; None where all are.
    """

    def __init__(self, rows: int, mask: Tensor | None) -> None:
        self.rows, self.mask = rows, mask
        self.seen: list[Tensor] = []

    def see(self, gate: nn.Module, args: tuple[Any, ...], opened: Tensor) -> None:
        """Notes each example's mean, `(rows, gates)`. A forward hook."""
        assert isinstance(gate, Gate)
        if opened.numel() % (self.rows * opened.shape[-1]):
            raise AdapterError(
                f"gates: a gate answers {tuple(opened.shape)}, which isn't a part for each of the "
                f"batch's {self.rows} rows."
            )
        values = opened.double().reshape(self.rows, -1, opened.shape[-1])
        if gate.kind != "token" or self.mask is None:
            self.seen.append(values.mean(1))
            return
        if self.mask.shape != values.shape[:2]:
            raise AdapterError(
                f"gates: the mask is {tuple(self.mask.shape)} and a gate sees "
                f"{tuple(values.shape[:2])} tokens, so that padding can't be told: give batches "
                "of one length without a mask."
            )
        weights = self.mask[..., None].to(values)
        self.seen.append((values * weights).sum(1) / weights.sum(1).clamp(min=1))


def _of_batch(
    model: nn.Module, adapter: Adapter, batch: Mapping[str, Any], drop: int
) -> dict[str, Tensor]:
    """Returns the gates of each example of a batch, `(rows, gates)`, where they act."""
    rows = _rows(batch)
    fixed = {
        place: value.double().expand(rows, -1) for place, value in _fixed(adapter, drop).items()
    }
    found, both = _opened(adapter), len(adapter.anatomy.stacks) > 1
    noted = {place: _Recorder(rows, _mask(gate, batch, both)) for place, gate in found.items()}
    handles = [found[place].register_forward_hook(one.see) for place, one in noted.items()]
    try:
        if found:
            model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    read = {place: torch.stack(one.seen).mean(0) for place, one in noted.items() if one.seen}
    return {**fixed, **read}


def _opened(adapter: Adapter) -> dict[str, Gate]:
    """Returns the gates that see the input, by place."""
    found = {graft.place.key: graft.delta._modules.get("gate") for graft in adapter.grafts}
    return {place: gate for place, gate in found.items() if isinstance(gate, Gate)}


def _fixed(adapter: Adapter, drop: int) -> dict[str, Tensor]:
    """Returns the values of gates that see no input, by place, but in the lowest blocks."""
    positions = adapter.anatomy.positions
    found: dict[str, Tensor] = {}
    for graft in adapter.grafts:
        if isinstance(graft.delta, GatedPrompt):
            at = block_of(graft.place.module, positions)
            if at is None or at >= drop:
                found[graft.place.key] = graft.delta.opened().detach()
    return found


def _rows(batch: Mapping[str, Any]) -> int:
    first = next((value for value in batch.values() if isinstance(value, Tensor)), None)
    if first is None:
        raise SettingsError("gates: a batch holds no tensor.")
    return len(first)


def _mask(gate: Gate, batch: Mapping[str, Any], both: bool) -> Tensor | None:
    """Returns which tokens of a gate's stack are real; `both`: the model has two stacks."""
    if gate.stack not in ("encoder", "decoder", "text"):
        return None
    name = "decoder_attention_mask" if both and gate.stack == "decoder" else "attention_mask"
    mask = batch.get(name)
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None


def _reading(member: str, values: Tensor) -> GateReading:
    return GateReading(
        member,
        values.mean(0).float().cpu(),
        values.std(0, correction=0).float().cpu(),
        len(values),
    )


def _member(adapter: Adapter, graft: Graft) -> str:
    method = adapter.method
    return method.parts[graft.part].name if isinstance(method, Hybrid) else method.name


def _gated(model: nn.Module, name: str) -> Adapter:
    state = state_of(model)
    check_names(name, state.adapters)
    adapter = state.adapters[name]
    if not has_gates(adapter):
        raise AdapterError(
            f'Adapter "{name}" is {adapter.method.name} without gates: set gate="auto" on its '
            "method, or take UniPELT or LLaMAAdapter."
        )
    return adapter
