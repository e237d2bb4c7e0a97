"""Which base an adapter needs, from what its directory says, and loading it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftune.errors import FormatError

if TYPE_CHECKING:
    from graftune.tasks.models import Base

_TASKS = {
    "SEQ_CLS": "classification",
    "CAUSAL_LM": "causal-lm",
    "SEQ_2_SEQ_LM": "seq2seq-lm",
    "FEATURE_EXTRACTION": "feature",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
}


def load_base_of(folder: Path, base: str | None) -> Base:
    """Returns the base model that an adapter's directory was made for, with its head's labels.

    Args:
        folder: The adapter's directory.
        base: A base to load instead of the one that the directory names.

    Raises:
        FormatError: The directory doesn't say its base, or is no adapter's.
    """
    from graftune.tasks.models import WITH_LABELS, load_base
    from graftune.tasks.quantising import Quantising
    from graftune.tasks.task import tasks

    config = _read(folder / "adapter_config.json")
    if config is None:
        raise FormatError(f'"{folder}" is no adapter: it has no adapter_config.json.')
    ours = _read(folder / "graftune_task.json") or {}
    spec = base or ours.get("base") or config.get("base_model_name_or_path")
    if not spec:
        raise FormatError(f'"{folder}" names no base model; say which with --base.')
    own = tasks().get(str(ours.get("task")))
    task = own.model_task if own is not None else _TASKS.get(str(config.get("task_type")))
    labels = (ours.get("labels") or _labels(folder)) if task in WITH_LABELS else None
    quantize = Quantising.told(ours)
    loaded = load_base(str(spec), task or "causal-lm", labels=labels, quantize=quantize)
    if ours.get("chat_template"):
        loaded.tokenizer.chat_template = ours["chat_template"]
    return loaded


def _labels(folder: Path) -> list[str] | None:
    """Returns made-up names for the classes of a directory that keeps only their tensors."""
    count = _label_count(folder, _read(folder / "graftune.json") or {}, {})
    return None if count is None else [f"LABEL_{index}" for index in range(count)]


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FormatError(f"{path} is not JSON: {error}.") from None


_AUTO = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
}
_OF_HEADS = {
    "classification": "AutoModelForSequenceClassification",
    "multilabel_classification": "AutoModelForSequenceClassification",
    "image_classification": "AutoModelForImageClassification",
    "tagging": "AutoModelForTokenClassification",
    "question_answering": "AutoModelForQuestionAnswering",
}


def load_model_of(folder: Path, base: str | None, *, head: bool = True) -> Any:
    """Returns the model that an adapter of any program was made for, without a tokenizer.

    Args:
        folder: The adapter's directory.
        base: A base to load instead of the one that the directory names.
        head: Whether the adapter's head will be loaded, which then needs a place of its size.

    Raises:
        FormatError: The directory doesn't say its base, or is no adapter's.
        SettingsError: There is no such base.
    """
    import transformers

    from graftune.tasks.base_specs import locate, not_found
    from graftune.tasks.gguf_models import quiet

    config = _read(folder / "adapter_config.json")
    if config is None:
        raise FormatError(f'"{folder}" is no adapter: it has no adapter_config.json.')
    own = _read(folder / "graftune.json") or {}
    beside = (_read(folder / "head_config.json") or {}) if head else {}
    spec = base or _named_base(folder, config)
    source = locate(spec, lambda line: None)
    kind: Any = getattr(transformers, _class_name(config, own, beside))
    count = _label_count(folder, own, beside) if head else None
    labels = {} if count is None else {"num_labels": count, "ignore_mismatched_sizes": True}
    try:
        with quiet():
            return kind.from_pretrained(
                str(source), use_safetensors=True, trust_remote_code=False, **labels
            ).eval()
    except (OSError, ValueError, RuntimeError) as error:
        raise not_found(spec, " ".join(str(error).split("\n")[0].split())) from error


def _named_base(folder: Path, config: dict[str, Any]) -> str:
    task = _read(folder / "graftune_task.json") or {}
    named = config.get("base_model_name_or_path") or config.get("model_name")
    spec = task.get("base") or named
    if not spec:
        raise FormatError(f'"{folder}" names no base model; say which with --base.')
    return str(spec)


def _class_name(config: dict[str, Any], own: dict[str, Any], head: dict[str, Any]) -> str:
    """Returns the class of transformers that an adapter needs its base as."""
    import transformers

    mapped = (config.get("auto_mapping") or {}).get("base_model_class")
    for name in (own.get("base", {}).get("class"), mapped, config.get("model_class")):
        if name and hasattr(transformers, str(name)):
            return str(name)
    kind = (head.get("config") or {}).get("head_type")
    return _AUTO.get(str(config.get("task_type"))) or _OF_HEADS.get(str(kind), "AutoModel")


def _label_count(folder: Path, own: dict[str, Any], head: dict[str, Any]) -> int | None:
    """Returns how many classes an adapter's head tells apart, None where it has none of its own."""
    from graftune.formats.inspecting import inspect

    told = head.get("num_labels") or (head.get("config") or {}).get("num_labels")
    if told or head:
        return told
    try:
        found = inspect(folder)
    except FormatError:  # a pickle, which isn't looked into
        return None
    heads = own.get("heads") or found.heads
    ends = tuple(f"{name}.weight" for name in ("classifier", "score", "out_proj"))
    rows = [
        entry.shape[0]
        for entry in found.tensors
        if entry.name.endswith(ends) and any(f"{name}." in entry.name for name in heads)
    ]
    return rows[-1] if rows else None
