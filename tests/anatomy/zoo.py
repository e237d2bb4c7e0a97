"""Every model type transformers knows for three tasks, built on the meta device with few layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto as auto

MAPPINGS = {
    "causal": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "classification": auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "seq2seq": auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
}
LAYERS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "encoder_layers",
    "decoder_layers",
    "num_encoder_layers",
    "num_decoder_layers",
    "depth",
)
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
KEPT_LAYERS, KEPT_EXPERTS = 4, 8


def classes() -> dict[str, str]:
    """Returns one class name per model type: the causal one, else classification, else seq2seq."""
    found: dict[str, str] = {}
    for mapping in MAPPINGS.values():
        for model_type, name in mapping.items():
            found.setdefault(model_type, name if isinstance(name, str) else name[0])
    return found


def build(model_type: str, class_name: str) -> PreTrainedModel:
    """Returns the model on the meta device, as small as its config lets it be made."""
    model_class = getattr(transformers, class_name)
    errors: list[str] = []
    for config in _configs(model_type, model_class):
        try:
            with torch.device("meta"):
                return model_class(config).eval()
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")
    raise RuntimeError(errors[0] if errors else "no config could be made")


def _configs(model_type: str, model_class: type[PreTrainedModel]) -> Iterator[Any]:
    """Yields configs from the smallest to the default one."""
    classes = [model_class.config_class, transformers.CONFIG_MAPPING[model_type]]
    for config_class in dict.fromkeys(classes):
        for shrink in (_small_from_start, _small_afterwards, lambda made: made()):
            try:
                yield shrink(config_class)
            except Exception:
                continue


def _small_from_start(config_class: Any) -> Any:
    default = config_class()
    settings = {key: KEPT_LAYERS for key in LAYERS if _is_above(default, key, KEPT_LAYERS)}
    settings |= {key: KEPT_EXPERTS for key in EXPERTS if _is_above(default, key, KEPT_EXPERTS)}
    return _shrink_parts(config_class(**settings))


def _small_afterwards(config_class: Any) -> Any:
    return _shrink_parts(_shrink(config_class()))


def _is_above(config: Any, key: str, limit: int) -> bool:
    value = getattr(config, key, None)
    return isinstance(value, int) and value > limit


def _shrink(config: Any) -> Any:
    depths = {getattr(config, key) for key in LAYERS if _is_above(config, key, KEPT_LAYERS)}
    for key, value in list(vars(config).items()):
        if isinstance(value, (list, tuple)) and len(value) in depths:
            setattr(config, key, value[:KEPT_LAYERS])
    for key in LAYERS:
        if _is_above(config, key, KEPT_LAYERS):
            setattr(config, key, KEPT_LAYERS)
    for key in EXPERTS:
        if _is_above(config, key, KEPT_EXPERTS):
            setattr(config, key, KEPT_EXPERTS)
    return config


def _shrink_parts(config: Any) -> Any:
    for key in getattr(config, "sub_configs", {}):
        part = getattr(config, key, None)
        if part is not None and not isinstance(part, dict):
            _shrink_parts(_shrink(part))
    return config
