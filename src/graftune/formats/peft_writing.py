"""A LoRA of ours as HF PEFT writes one: adapter_config.json's settings and the tensors' names."""

from __future__ import annotations

import collections
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from graftune.formats import factors as forms
from graftune.formats.base import base_name, embeddings
from graftune.formats.factors import Factors
from graftune.formats.peft_settings import (
    DEFAULTS,
    TASK_HEADS,
    pattern_value,
    saved_modules,
    targeted_modules,
    targeted_parameters,
)
from graftune.methods._low_rank import TokenRows
from graftune.methods.lora import LoRA
from graftune.sites import hosts
from graftune.sites.base import is_base
from graftune.sites.parameter import OwnValue

if TYPE_CHECKING:
    from graftune.adapter import Adapter

PEFT_VERSION = "0.19.0"
"""The oldest PEFT that knows every setting written here."""
_INITS = {"gaussian": "gaussian"}


def tensors(adapter: Adapter) -> dict[str, Tensor]:
    """Returns a LoRA's tensors under PEFT's names, without "base_model.model."."""
    model = adapter.model
    found = forms.whole(model, adapter.grafts)
    named = forms.file_tensors(model, found)
    wrapped = {factors.module for factors in found if not factors.of_experts}
    for graft in adapter.grafts:
        place, delta = graft.place, graft.delta
        if isinstance(delta, TokenRows):
            key = f"{place.module}.token_adapter.trainable_tokens_delta"
            named[key] = delta.rows.detach()
        elif isinstance(delta, OwnValue):
            inner = "base_layer." if place.module in wrapped else ""
            key = f"{place.module}.{inner}{place.parameter}" if place.module else place.parameter
            named[key] = delta.value.detach()
    return named | _twins(adapter) | _buffers(adapter)


def config(adapter: Adapter) -> dict[str, Any]:
    """Returns the content of adapter_config.json: PEFT's keys, those that others read."""
    method, model = adapter.method, adapter.model
    assert isinstance(method, LoRA)
    found = forms.whole(model, adapter.grafts)
    heads = saved_heads(adapter)
    task = task_type(model, heads)
    return {
        **DEFAULTS,
        **_targets(model, found, _short_heads(model, heads)),
        **_ranks(method, found),
        "auto_mapping": None if task else _auto_mapping(model),
        "base_model_name_or_path": base_name(model) or None,
        "bias": method.bias,
        "fan_in_fan_out": _fan_in_fan_out(model, found),
        "init_lora_weights": _INITS.get(method.init, True),
        "lora_bias": method.lora_bias,
        "lora_dropout": method.dropout,
        "peft_version": PEFT_VERSION,
        "task_type": task,
        "trainable_token_indices": _tokens(adapter),
        "use_dora": method.dora,
        "use_rslora": method.rslora,
    }


def task_type(model: nn.Module, heads: Sequence[str]) -> str | None:
    """Returns PEFT's name of a model's task, where PEFT then treats its head as we do."""
    name = type(model).__name__
    ends = {
        "ForSequenceClassification": "SEQ_CLS",
        "ForTokenClassification": "TOKEN_CLS",
        "ForQuestionAnswering": "QUESTION_ANS",
        "ForCausalLM": "CAUSAL_LM",
        "LMHeadModel": "CAUSAL_LM",
        "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    }
    task = next((task for end, task in ends.items() if name.endswith(end)), None)
    if getattr(model, "main_input_name", "") != "input_ids":
        return None  # PEFT's classes for tasks pass token ids
    if task == "SEQ_2_SEQ_LM" and not getattr(model.config, "is_encoder_decoder", False):
        return None
    if task in TASK_HEADS:
        added = saved_modules(
            {"modules_to_save": list(TASK_HEADS[task])}, (n for n, _ in model.named_modules())
        )
        return task if added and set(added) <= set(heads) else None
    return task


def saved_heads(adapter: Adapter) -> tuple[str, ...]:
    """Returns the modules that PEFT must save whole: heads, and those whose tensors they share."""
    modules = [*adapter.head_names, *(key.rpartition(".")[0] for key in _twins(adapter))]
    return tuple(dict.fromkeys(modules))


def _twins(adapter: Adapter) -> dict[str, Tensor]:
    """Returns a head's values under the names of other modules that share its tensors."""
    from graftune.sites.placing import tensor_names

    if not adapter.head_names:
        return {}
    model, names, found = adapter.model, tensor_names(adapter.model), {}
    for graft in adapter.grafts:
        place, delta = graft.place, graft.delta
        if (
            isinstance(delta, OwnValue)
            and delta.shared
            and is_below(place.module, adapter.head_names)
        ):
            base = model.get_submodule(place.module)._parameters.get(place.parameter)
            for module, parameter in names.get(id(base), ()):
                if (module, parameter) != (place.module, place.parameter):
                    found[f"{module}.{parameter}"] = delta.value.detach()
    return found


def is_below(module: str, heads: Iterable[str]) -> bool:
    """Whether a module is one of `heads` or lies in one."""
    return any(module == head or module.startswith(f"{head}.") for head in heads)


def _buffers(adapter: Adapter) -> dict[str, Tensor]:
    """Returns the buffers of heads: PEFT expects a saved module's whole state."""
    found: dict[str, Tensor] = {}
    for head in adapter.head_names:
        module = adapter.model.get_submodule(head)
        kept = module.state_dict().keys()
        for name, buffer in module.named_buffers():
            if name in kept and is_base(name):
                found[f"{head}.{name}"] = buffer
    return found


def _targets(model: nn.Module, found: Sequence[Factors], heads: list[str] | None) -> dict[str, Any]:
    settings = DEFAULTS | {"modules_to_save": heads}
    modules = [name for name, _ in model.named_modules() if ".deltas" not in f".{name}"]
    wanted = [factors.module for factors in found if not factors.of_experts]
    experts = [factors.name for factors in found if factors.of_experts]
    every = [name for name, _ in model.named_parameters() if is_base(name)]
    return {
        "modules_to_save": heads,
        "target_modules": _shortest(
            wanted, lambda t: targeted_modules(settings | {"target_modules": t}, modules)
        ),
        "target_parameters": _shortest(
            experts, lambda t: targeted_parameters({"target_parameters": t}, every)
        )
        or None,
    }


def _shortest(wanted: Sequence[str], matched: Any) -> list[str] | str:
    """Returns the last parts of names if they mean no others, else the names, else a pattern."""
    if not wanted:
        return []
    for parts in (1, 2):
        ends = sorted({".".join(name.split(".")[-parts:]) for name in wanted})
        if set(matched(ends)) == set(wanted):
            return ends
    names = sorted(wanted)
    if set(matched(names)) == set(wanted):
        return names
    return "|".join(name.replace(".", r"\.") for name in names)


def _ranks(method: LoRA, found: Sequence[Factors]) -> dict[str, Any]:
    pairs = {factors.name: (factors.rank, _alpha(method, factors)) for factors in found}
    if not pairs:
        return {"r": method.r, "lora_alpha": method.alpha or method.r}
    given = {
        "r": method.r,
        "lora_alpha": _whole_number(method.alpha if method.alpha is not None else method.r),
        "rank_pattern": method.rank_pattern or {},
        "alpha_pattern": method.alpha_pattern or {},
    }
    if all(_means(given, name) == pair for name, pair in pairs.items()):
        return given
    usual = collections.Counter(pairs.values()).most_common(1)[0][0]
    return {
        "r": usual[0],
        "lora_alpha": usual[1],
        "rank_pattern": _exceptions({name: pair[0] for name, pair in pairs.items()}, usual[0]),
        "alpha_pattern": _exceptions({name: pair[1] for name, pair in pairs.items()}, usual[1]),
    }


def _means(settings: Mapping[str, Any], name: str) -> tuple[int, float]:
    return (
        pattern_value(settings["rank_pattern"], name, settings["r"]),
        pattern_value(settings["alpha_pattern"], name, settings["lora_alpha"]),
    )


def _exceptions(values: Mapping[str, Any], usual: Any) -> dict[str, Any]:
    return {f"^{name}": value for name, value in sorted(values.items()) if value != usual}


def _alpha(method: LoRA, factors: Factors) -> float:
    """Returns the alpha that gives the change its scale at the rank the file counts."""
    divisor = math.sqrt(factors.rank) if method.rslora else factors.rank
    return _whole_number(factors.scale * divisor)


def _whole_number(value: float) -> float:
    return round(value) if abs(value - round(value)) < 1e-9 else value


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


def _short_heads(model: nn.Module, heads: Sequence[str]) -> list[str] | None:
    """Returns the heads' names for `modules_to_save`, as short as they mean nothing else."""
    if not heads:
        return None
    modules = [name for name, _ in model.named_modules()]
    ends = sorted({head.rpartition(".")[2] for head in heads})
    found = saved_modules({"modules_to_save": ends}, modules)
    return ends if set(found) == set(heads) else sorted(heads)


def _auto_mapping(model: nn.Module) -> dict[str, str]:
    kind = type(model)
    return {"base_model_class": kind.__name__, "parent_library": kind.__module__}
