"""What HF PEFT writes of every adapter: which modules, whose heads, what task, what base."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from graftune.anatomy.modules import is_in
from graftune.formats.base import base_name
from graftune.formats.peft_settings import TASK_HEADS, saved_modules, targeted_modules
from graftune.sites.base import base_modules, is_base
from graftune.sites.parameter import OwnValue
from graftune.sites.placing import tensor_names

if TYPE_CHECKING:
    from graftune.adapter import Adapter

PREFIX = "base_model.model."
"""What the tensors' names begin with in PEFT's files."""
PROMPT_PREFIX = "base_model."
"""The same for heads beside a prompt, whose base PEFT wraps once less."""
PEFT_VERSION = "0.19.0"
"""The oldest PEFT that knows every setting written here."""


def common_config(adapter: Adapter, modules: Sequence[str]) -> dict[str, Any]:
    """Returns the settings that all of PEFT's methods have.

    Args:
        adapter: whose heads are saved whole.
        modules: the names of the modules that it changes.
    """
    model, heads = adapter.model, saved_heads(adapter)
    task = task_type(model, heads)
    short = short_heads(model, heads)
    rules = {**NO_RULES, "modules_to_save": short}
    names = list(base_modules(model))
    return {
        "auto_mapping": None if task else auto_mapping(model),
        "base_model_name_or_path": base_name(model) or None,
        "inference_mode": True,
        "modules_to_save": short,
        "peft_version": PEFT_VERSION,
        "revision": None,
        "target_modules": shortest(
            modules, lambda ends: targeted_modules(rules | {"target_modules": ends}, names)
        ),
        "task_type": task,
    }


NO_RULES: dict[str, Any] = {
    "exclude_modules": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "modules_to_save": None,
    "target_modules": None,
}
"""What decides which modules a config means, where it decides nothing."""


def own_values(adapter: Adapter, wrapped: Iterable[str] = ()) -> dict[str, Tensor]:
    """Returns the adapter's own values of the base's tensors under PEFT's names.

    Args:
        adapter: its heads and biases.
        wrapped: modules that PEFT wraps, so that their own tensors are one level deeper.
    """
    named, inside = dict[str, Tensor](), set(wrapped)
    for graft in adapter.grafts:
        place, delta = graft.place, graft.delta
        if isinstance(delta, OwnValue):
            inner = "base_layer." if place.module in inside else ""
            key = f"{place.module}.{inner}{place.parameter}" if place.module else place.parameter
            named[key] = delta.value.detach()
    return named | twins(adapter) | buffers(adapter)


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
    modules = [*adapter.head_names, *(key.rpartition(".")[0] for key in twins(adapter))]
    return tuple(dict.fromkeys(modules))


def twins(adapter: Adapter) -> dict[str, Tensor]:
    """Returns a head's values under the names of other modules that share its tensors."""
    if not adapter.head_names:
        return {}
    model, names, found = adapter.model, tensor_names(adapter.model), {}
    for graft in adapter.grafts:
        place, delta = graft.place, graft.delta
        if isinstance(delta, OwnValue) and delta.shared and is_in(place.module, adapter.head_names):
            base = model.get_submodule(place.module)._parameters.get(place.parameter)
            for module, parameter in names.get(id(base), ()):
                if (module, parameter) != (place.module, place.parameter):
                    found[f"{module}.{parameter}"] = delta.value.detach()
    return found


def buffers(adapter: Adapter) -> dict[str, Tensor]:
    """Returns the buffers of heads: PEFT expects a saved module's whole state."""
    found: dict[str, Tensor] = {}
    for head in adapter.head_names:
        module = adapter.model.get_submodule(head)
        kept = module.state_dict().keys()
        for name, buffer in module.named_buffers():
            if name in kept and is_base(name):
                found[f"{head}.{name}"] = buffer
    return found


def shortest(wanted: Sequence[str], matched: Callable[[Any], list[str]]) -> list[str] | str:
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


def short_heads(model: nn.Module, heads: Sequence[str]) -> list[str] | None:
    """Returns the heads' names for `modules_to_save`, as short as they mean nothing else."""
    if not heads:
        return None
    modules = [name for name, _ in model.named_modules()]
    ends = sorted({head.rpartition(".")[2] for head in heads})
    found = saved_modules({"modules_to_save": ends}, modules)
    return ends if set(found) == set(heads) else sorted(heads)


def auto_mapping(model: nn.Module) -> dict[str, str]:
    """Returns the base's class as PEFT notes it where no task says it."""
    kind = type(model)
    return {"base_model_class": kind.__name__, "parent_library": kind.__module__}


def without_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns tensors by the names that modules have in the model.

    With `bias` other than "none" PEFT also writes its own copies of a saved module's bias; those
    are left out.
    """
    named = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    return {name: tensor for name, tensor in named.items() if not _is_copy(name, named)}


def _is_copy(name: str, named: Mapping[str, Tensor]) -> bool:
    for mark in (".original_module.", ".modules_to_save.default.", ".modules_to_save."):
        if mark in name:
            return name.replace(mark, ".") in named
    return False
