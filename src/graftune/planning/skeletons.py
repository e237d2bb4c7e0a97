"""A model with a method on it and no numbers: shapes and types alone, of any size, in seconds."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from graftune.adapter import Adapter, attach
from graftune.errors import FormatError, SettingsError, nearest
from graftune.methods.base import Method
from graftune.tasks.models import TASKS as TEXT_TASKS
from graftune.tasks.models import base_config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

TASKS = {
    **TEXT_TASKS,
    "image-classification": "AutoModelForImageClassification",
    "speech-to-text": "AutoModelForSpeechSeq2Seq",
}
"""What a model can be made for, and the class of transformers that makes it."""


@dataclass(frozen=True)
class Base:
    """What a plan is of: a configuration and what it is called."""

    config: PreTrainedConfig
    name: str
    task: str


def base_of(model: Any, task: str | None, labels: int) -> Base:
    """Returns the configuration that a model's name, folder or settings stand for, and its task.

    Args:
        model: a name, folder or GGUF file as `graftune train` takes it, a config.json, what it
            says, or transformers' configuration.
        task: of `TASKS`, or a task of `graftune train`; None: what the configuration is of.
        labels: outputs of a new head.

    Raises:
        SettingsError: there is no such model, model type or task.
        FormatError: a folder or file holds no configuration.
    """
    config, name = _config(model)
    chosen = _task(config, task)
    if chosen in ("classification", "token-classification", "image-classification"):
        config.num_labels = labels
    return Base(config, name, chosen)


def meta_model(base: Base, dtype: torch.dtype) -> PreTrainedModel:
    """Returns the model on the meta device, its head new as loading would make it.

    Raises:
        SettingsError: transformers has no such model for the task.
    """
    with torch.device("meta"):
        return random_model(base, dtype)


def random_model(base: Base, dtype: torch.dtype) -> PreTrainedModel:
    """Returns the model with random weights.

    Raises:
        SettingsError: as for `meta_model`.
    """
    import transformers

    auto: Any = getattr(transformers, TASKS[base.task])
    if type(base.config) not in auto._model_mapping:
        fitting = [task for task in TASKS if _serves(base.config, task)]
        raise SettingsError(
            f"{base.name} is a {base.config.model_type} model, which transformers has no class of "
            f"for {base.task}; it has for {', '.join(fitting) or 'nothing that can be planned'}."
        )
    return auto.from_config(copy.deepcopy(base.config), dtype=dtype)


def can_checkpoint(base: Base) -> bool:
    """Returns whether the model's class can compute its activations twice."""
    import transformers

    found: Any = getattr(transformers, TASKS[base.task])._model_mapping.get(type(base.config), None)
    kind = found[0] if isinstance(found, tuple) else found
    return bool(getattr(kind, "supports_gradient_checkpointing", False))


def is_encoder(base: Base) -> bool:
    """Returns whether the model reads both ways and writes nothing."""
    return not base.config.is_encoder_decoder and _serves(base.config, "masked-lm")


def attached(model: PreTrainedModel, method: Method) -> Adapter:
    """Returns the adapter that a method makes on a model without numbers, ready to train."""
    adapter = attach(model, method)
    model.train()
    return adapter


def make_fake(model: nn.Module, mode: FakeTensorMode) -> None:
    """Makes a meta model's tensors stand for some on a device, tied ones together."""
    made: dict[int, Tensor] = {}

    def stand_in(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            fake = FakeTensor(mode, tensor.detach(), torch.device("cpu"))
            is_parameter = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake
        return made[id(tensor)]

    for module in model.modules():
        _replace(module._parameters, stand_in)
        _replace(module._buffers, stand_in)


def _replace(tensors: Any, stand_in: Callable[[Tensor], Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor is not None:
            tensors[name] = stand_in(tensor)


def _config(model: Any) -> tuple[PreTrainedConfig, str]:
    from transformers import PreTrainedConfig

    if isinstance(model, PreTrainedConfig):
        return copy.deepcopy(model), model.name_or_path or "the model"
    if isinstance(model, Mapping):
        settings = {str(key): value for key, value in model.items()}
        return _from_settings(settings, "the configuration"), settings.get("name", "the model")
    spec = str(model)
    file = Path(spec).expanduser()
    if file.is_dir() and (file / "config.json").is_file():
        file = file / "config.json"
    if file.suffix == ".json" and file.is_file():
        return _from_settings(_read(file), str(file)), spec
    found = base_config(spec)
    if found is None:
        from graftune.tasks.base_specs import locate

        found = base_config(str(locate(spec, _note)))
    assert found is not None
    return found, spec


def _note(text: str) -> None:
    print(text, file=sys.stderr)  # standard output is for the plan


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FormatError(f"{file} is no configuration: {error}.") from error
    if not isinstance(found, dict):
        raise FormatError(f"{file} is no configuration: it holds no settings by name.")
    return found


def _from_settings(settings: dict[str, Any], where: str) -> PreTrainedConfig:
    from transformers import CONFIG_MAPPING, AutoConfig

    kind = settings.get("model_type")
    if kind not in CONFIG_MAPPING:
        said = "names no model_type" if kind is None else f'has the model_type "{kind}"'
        raise SettingsError(
            f"{where} {said}, which transformers doesn't know."
            f"{nearest(str(kind), CONFIG_MAPPING.keys())}"
        )
    try:
        return AutoConfig.for_model(**settings)
    except (TypeError, ValueError, AttributeError) as error:
        why = " ".join(str(error).split())
        raise FormatError(f"{where} can't be read as a {kind} configuration: {why}") from error


def _serves(config: PreTrainedConfig, task: str) -> bool:
    import transformers

    return type(config) in getattr(transformers, TASKS[task])._model_mapping


def _task(config: PreTrainedConfig, task: str | None) -> str:
    from graftune.tasks.models import LANGUAGE_MODEL
    from graftune.tasks.task import tasks

    if task is None:
        return _natural(config)
    known = tasks()
    model_task = known[task].model_task if task in known else task
    if model_task == LANGUAGE_MODEL:
        return "seq2seq-lm" if config.is_encoder_decoder else "causal-lm"
    if model_task == "causal-lm" and config.is_encoder_decoder:
        return "seq2seq-lm"
    if model_task not in TASKS:
        names = (*known, *TASKS)
        raise SettingsError(
            f'task is "{task}", expected one of {", ".join(names)}.{nearest(task, names)}'
        )
    return model_task


def _natural(config: PreTrainedConfig) -> str:
    """Returns the task of a configuration's class: translators translate, encoders classify."""
    if config.is_encoder_decoder:
        return "seq2seq-lm" if _serves(config, "seq2seq-lm") else "speech-to-text"
    if _serves(config, "causal-lm") and not _serves(config, "masked-lm"):
        return "causal-lm"
    order = ("classification", "image-classification", "causal-lm", "feature")
    return next((task for task in order if _serves(config, task)), "feature")
