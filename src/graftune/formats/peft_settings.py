"""HF PEFT's LoRA settings: what each means here, and which modules a config's rules name.

Every field of PEFT's LoraConfig is in one of three tables: read, of no effect on what the adapter
computes, or refused unless it has its neutral value. Anything else is refused by name, with the
version that wrote it, since a setting that is silently ignored gives silently wrong results.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from graftune.errors import FormatError, nearest

READ = (
    *("alpha_pattern", "bias", "exclude_modules", "fan_in_fan_out", "init_lora_weights"),
    *("layers_pattern", "layers_to_transform", "lora_alpha", "lora_bias", "lora_dropout"),
    *("modules_to_save", "peft_type", "r", "rank_pattern", "target_modules", "target_parameters"),
    *("task_type", "trainable_token_indices", "use_dora", "use_rslora"),
    *("base_model_name_or_path", "peft_version", "revision"),
)
"""Settings that are followed."""

WITHOUT_EFFECT = (
    *("auto_mapping", "inference_mode", "megatron_core", "qalora_group_size", "runtime_config"),
    *("eva_config", "corda_config", "lora_ga_config", "loftq_config"),
)
"""Settings that don't change what trained weights compute, or only together with a refused one."""

REFUSED: dict[str, str] = {
    "alora_invocation_tokens": "acts only after certain tokens (aLoRA)",
    "arrow_config": "routes each token between adapters (Arrow)",
    "ensure_weight_tying": "shares one adapter between tied modules",
    "kasa_config": "puts singular values between A and B (KaSA)",
    "layer_replication": "builds a deeper model out of repeated layers",
    "megatron_config": "splits the layers over devices (Megatron)",
    "monteclora_config": "samples the weights (MonteCLoRA)",
    "use_bdlora": "keeps A or B as blocks (BD-LoRA)",
    "use_qalora": "pools the inputs in groups (QA-LoRA)",
    "velora_config": "compresses what the backward pass keeps (VeLoRA)",
}
"""Settings that change the equation or the model in a way not supported here."""

PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal", "mica")
"""Initial values that leave the base model as it is."""
REDONE_INITS = ("pissa", "olora")
"""Initial values taken out of the base weights, which are computed again when loading."""

DEFAULTS: dict[str, Any] = {
    "alpha_pattern": {},
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "bias": "none",
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layers_pattern": None,
    "layers_to_transform": None,
    "lora_alpha": 8,
    "lora_bias": False,
    "lora_dropout": 0.0,
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": 8,
    "rank_pattern": {},
    "revision": None,
    "target_modules": None,
    "target_parameters": None,
    "task_type": None,
    "trainable_token_indices": None,
    "use_dora": False,
    "use_rslora": False,
}
"""What a config that lacks a key means by it; also the keys of the configs written here."""

TASK_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""Modules that PEFT adds to `modules_to_save` for a task type."""


def checked(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Returns a LoRA config with every known key filled in.

    Raises:
        FormatError: a setting is unknown, not supported or of the wrong kind.
    """
    known = {*READ, *WITHOUT_EFFECT, *REFUSED}
    wrote = config.get("peft_version")
    version = f"PEFT {wrote}" if wrote else "a PEFT that doesn't give its version"
    for key, value in config.items():
        if key not in known and value not in (None, False, [], {}):
            raise FormatError(
                f'{where}: setting "{key}" ({value!r:.60}), written by {version}, is unknown here.'
                f"{nearest(key, known)}"
            )
        if key in REFUSED and value not in (None, False, [], {}):
            raise FormatError(
                f'{where}: setting "{key}" ({value!r:.60}), written by {version}, '
                f"{REFUSED[key]}: not supported."
            )
    given = {key: value for key, value in config.items() if key in DEFAULTS and value is not None}
    full = DEFAULTS | given
    _check_kinds(full, where, version)
    return full


def _check_kinds(config: dict[str, Any], where: str, version: str) -> None:
    init = config["init_lora_weights"]
    if init not in (*PLAIN_INITS, *REDONE_INITS):
        raise FormatError(
            f'{where}: "init_lora_weights" is {init!r} ({version}): its weights belong to a '
            "changed base model that this file doesn't hold. Save it again in PEFT with "
            "path_initial_model_for_weight_conversion, which makes an ordinary LoRA of it."
        )
    if config["bias"] not in ("none", "all", "lora_only"):
        raise FormatError(
            f'{where}: "bias" is {config["bias"]!r}; expected none, all or lora_only.'
        )
    for key in ("r", "lora_alpha"):
        value = config[key]
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise FormatError(f'{where}: "{key}" is {value!r}; expected a number above 0.')
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config[key], dict):
            raise FormatError(f'{where}: "{key}" is {config[key]!r:.60}; expected an object.')
    for key in ("target_modules", "exclude_modules", "modules_to_save", "target_parameters"):
        value = config[key]
        texts = isinstance(value, list) and all(isinstance(item, str) for item in value)
        if value is not None and not isinstance(value, str) and not texts:
            raise FormatError(
                f'{where}: "{key}" is {value!r:.60}; expected names or a regular expression.'
            )


def names(value: Any) -> tuple[str, ...]:
    """Returns a list setting as a tuple: None is (), text is one name."""
    return () if value is None else (value,) if isinstance(value, str) else tuple(value)


def targeted_modules(config: Mapping[str, Any], modules: Iterable[str]) -> list[str]:
    """Returns those of a model's module names that PEFT would put a LoRA on, in order."""
    return [name for name in modules if name and _is_target(config, name)]


def targeted_parameters(config: Mapping[str, Any], parameters: Iterable[str]) -> list[str]:
    """Returns those of a model's tensor names that `target_parameters` names, in order."""
    wanted = names(config["target_parameters"])
    return [name for name in parameters if _named(name, wanted)]


def saved_modules(config: Mapping[str, Any], modules: Iterable[str]) -> list[str]:
    """Returns the modules saved whole: their names end, dot or not, in `modules_to_save`."""
    wanted = names(config["modules_to_save"])
    return [name for name in modules if wanted and name.endswith(wanted)]


def _is_target(config: Mapping[str, Any], name: str) -> bool:
    excluded, targets = config["exclude_modules"], config["target_modules"]
    if isinstance(excluded, str) and excluded:
        if _full_match(excluded, name):
            return False
    elif _named(name, names(excluded)):
        return False
    saved = names(config["modules_to_save"])
    if any(re.match(rf"(^|.*\.){module}($|\..*)", name) for module in saved):
        return False
    if isinstance(targets, str):
        return _full_match(targets, name)
    if name in names(targets):
        return True
    return _named(name, names(targets)) and _in_layers(config, name)


def _in_layers(config: Mapping[str, Any], name: str) -> bool:
    wanted = config["layers_to_transform"]
    if wanted is None or wanted == []:
        return True
    patterns = names(config["layers_pattern"]) or (r"[^.]*",)
    lead = r"(?:^|.*?\.)" if config["layers_pattern"] else r".*?\."
    for pattern in patterns:
        match = re.match(rf"{lead}{pattern}\.(?P<index>\d+)\.", name)
        if match is not None:
            index = int(match["index"])
            return index == wanted if isinstance(wanted, int) else index in wanted
    return False


def _named(name: str, wanted: Iterable[str]) -> bool:
    return any(name == end or name.endswith(f".{end}") for end in wanted)


def _full_match(pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise FormatError(f"{pattern!r} isn't a regular expression: {error}.") from None
