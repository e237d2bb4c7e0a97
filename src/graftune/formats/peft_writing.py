"""A LoRA of ours as HF PEFT writes one: adapter_config.json's settings and the tensors' names."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from graftune.formats import factors as forms
from graftune.formats.base import embeddings
from graftune.formats.factors import Factors
from graftune.formats.peft_common import common_config, own_values, shortest
from graftune.formats.peft_ranks import rank_settings, whole_number
from graftune.formats.peft_settings import DEFAULTS, targeted_parameters
from graftune.methods._low_rank import TokenRows
from graftune.methods.lora import LoRA
from graftune.sites import hosts
from graftune.sites.base import is_base

if TYPE_CHECKING:
    from graftune.adapter import Adapter

_INITS = {"gaussian": "gaussian"}


def tensors(adapter: Adapter) -> dict[str, Tensor]:
    """Returns a LoRA's tensors under PEFT's names, without "base_model.model."."""
    model = adapter.model
    found = forms.whole(model, adapter.grafts)
    named = forms.file_tensors(model, found)
    wrapped = {factors.module for factors in found if not factors.of_experts}
    for graft in adapter.grafts:
        if isinstance(graft.delta, TokenRows):
            key = f"{graft.place.module}.token_adapter.trainable_tokens_delta"
            named[key] = graft.delta.rows.detach()
    return named | own_values(adapter, wrapped)


def config(adapter: Adapter) -> dict[str, Any]:
    """Returns the content of adapter_config.json: PEFT's keys, those that others read."""
    method, model = adapter.method, adapter.model
    assert isinstance(method, LoRA)
    found = forms.whole(model, adapter.grafts)
    return {
        **DEFAULTS,
        **common_config(adapter, [part.module for part in found if not part.of_experts]),
        **_ranks(method, found),
        "bias": method.bias,
        "fan_in_fan_out": _fan_in_fan_out(model, found),
        "init_lora_weights": _INITS.get(method.init, True),
        "lora_bias": method.lora_bias,
        "lora_dropout": method.dropout,
        "target_parameters": _parameters(model, found) or None,
        "trainable_token_indices": _tokens(adapter),
        "use_dora": method.dora,
        "use_rslora": method.rslora,
    }


def _parameters(model: nn.Module, found: Sequence[Factors]) -> list[str] | str:
    experts = [factors.name for factors in found if factors.of_experts]
    every = [name for name, _ in model.named_parameters() if is_base(name)]
    return shortest(experts, lambda ends: targeted_parameters({"target_parameters": ends}, every))


def _ranks(method: LoRA, found: Sequence[Factors]) -> dict[str, Any]:
    pairs = {factors.name: (factors.rank, _alpha(method, factors)) for factors in found}
    if not pairs:
        return {"r": method.r, "lora_alpha": method.alpha or method.r}
    ranks = rank_settings(method, pairs)
    return {"lora_alpha" if key == "alpha" else key: value for key, value in ranks.items()}


def _alpha(method: LoRA, factors: Factors) -> float:
    """Returns the alpha that gives the change its scale at the rank the file counts."""
    divisor = math.sqrt(factors.rank) if method.rslora else factors.rank
    return whole_number(factors.scale * divisor)


def _fan_in_fan_out(model: nn.Module, found: Iterable[Factors]) -> bool:
    hosts_of = [model.get_submodule(f.module) for f in found if not f.of_experts]
    return any(hosts.is_transposed(host) for host in hosts_of)


def _tokens(adapter: Adapter) -> list[int] | dict[str, list[int]] | None:
    found = {
        graft.place.module: graft.delta.ids.tolist()
        for graft in adapter.grafts
        if isinstance(graft.delta, TokenRows)
    }
    inputs, _ = embeddings(adapter.model)
    if len(found) == 1 and adapter.model.get_submodule(next(iter(found))) is inputs:
        return next(iter(found.values()))
    return found or None
