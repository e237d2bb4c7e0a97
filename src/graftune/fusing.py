"""What a trained fusion attends to, measured on data; leaving out members that matter little."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from graftune.activating import using
from graftune.attached import Adapter, state_of
from graftune.composition import check_names
from graftune.errors import AdapterError, SettingsError
from graftune.methods._batches import evaluating
from graftune.methods.fusion import AdapterFusion, FusionDelta, fusions


def fusion_weights(
    model: nn.Module, name: str, data: Iterable[Mapping[str, Tensor]], *, drop: int = 0
) -> dict[str, Tensor]:
    """Returns each member's mean attention at every fused sublayer, and keeps it for the report.

    Args:
        model: what the fusion is attached to.
        name: the fusion's.
        data: batches of what the model's forward takes; padding is left out of the mean.
        drop: lowest blocks in which nothing acts, so that there is nothing to measure.

    Returns:
        Per sublayer `(members,)`, in the order of `members`, summing to 1; a pruned one has 0.

    Raises:
        AdapterError: `name` isn't a fusion.
        SettingsError: there is no batch, or all of the fusion is dropped.
    """
    adapter = _fusion(model, name)
    layers = fusions(adapter)
    sums = {
        place: layer.kept.new_zeros(len(layer.kept), dtype=torch.float64)
        for place, layer in layers.items()
    }
    tokens = dict.fromkeys(layers, 0)
    with evaluating(model), using(model, name, drop=drop), torch.no_grad():
        for batch in data:
            for place, weights in _seen(model, layers, batch).items():
                sums[place][layers[place].kept] += weights.sum(0).to(sums[place])
                tokens[place] += len(weights)
    measured = {place: layer for place, layer in layers.items() if tokens[place]}
    if not measured:
        raise SettingsError(
            f"fusion_weights needs one batch or more and a fusion that acts, found none (drop is "
            f"{drop})."
        )
    for place, layer in measured.items():
        layer.attention.copy_(sums[place] / tokens[place])
    return {place: layer.attention.clone() for place, layer in measured.items()}


def prune_fusion(
    model: nn.Module, name: str, keep: int, data: Iterable[Mapping[str, Tensor]] | None = None
) -> dict[str, tuple[str, ...]]:
    """Leaves out all but the `keep` members with the most attention, in each layer on its own.

    Those left out are not computed there any more; the softmax is over the others.

    Args:
        model: what the fusion is attached to.
        name: the fusion's.
        keep: members kept in each layer.
        data: batches to measure on; None takes what was measured last.

    Returns:
        The members kept at every fused sublayer that was measured.

    Raises:
        AdapterError: `name` isn't a fusion, or nothing was measured.
        SettingsError: `keep` isn't from 1 to the number of members.
    """
    adapter = _fusion(model, name)
    method = adapter.method
    assert isinstance(method, AdapterFusion)
    if isinstance(keep, bool) or not isinstance(keep, int) or not 1 <= keep <= len(method.members):
        raise SettingsError(
            f"prune_fusion: keep is {keep!r}, expected from 1 to {len(method.members)}, the number "
            f'of members of "{name}".'
        )
    if data is not None:
        fusion_weights(model, name, data)
    measured = {place: layer for place, layer in fusions(adapter).items() if layer.is_measured}
    if not measured:
        raise AdapterError(
            f'Fusion "{name}" was never measured: pass data, or call gt.fusion_weights first.'
        )
    found: dict[str, tuple[str, ...]] = {}
    for place, layer in measured.items():
        best = layer.attention.topk(keep).indices
        layer.kept.zero_()[best] = True
        found[place] = tuple(str(method.members[i]) for i in layer.kept_members())
    return found


def _seen(
    model: nn.Module, layers: Mapping[str, FusionDelta], batch: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Returns the attention where the fusion acts, `(real tokens, members kept)`, of one batch."""
    for layer in layers.values():
        layer.seen = []
    try:
        model(**batch)
        return {p: _real(layer.seen, batch) for p, layer in layers.items() if layer.seen}
    finally:
        for layer in layers.values():
            layer.seen = None


def _real(seen: list[Tensor], batch: Mapping[str, Any]) -> Tensor:
    weights = torch.cat([part.flatten(0, -2) for part in seen])
    for name in ("attention_mask", "decoder_attention_mask"):
        mask = batch.get(name)
        if isinstance(mask, Tensor) and mask.numel() == len(weights):
            return weights[mask.flatten().bool()]
    return weights


def _fusion(model: nn.Module, name: str) -> Adapter:
    state = state_of(model)
    check_names(name, state.adapters)
    adapter = state.adapters[name]
    if not isinstance(adapter.method, AdapterFusion):
        raise AdapterError(f'Adapter "{name}" is {adapter.method.name}, not an AdapterFusion.')
    return adapter
