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
}
_OURS = {"classification": "classification", "instruct": "causal-lm", "choices": "lm"}


def load_base_of(folder: Path, base: str | None) -> Base:
    """Returns the base model that an adapter's directory was made for, with its head's labels.

    Args:
        folder: The adapter's directory.
        base: A base to load instead of the one that the directory names.

    Raises:
        FormatError: The directory doesn't say its base, or is no adapter's.
    """
    from graftune.tasks.models import load_base

    config = _read(folder / "adapter_config.json")
    if config is None:
        raise FormatError(f'"{folder}" is no adapter: it has no adapter_config.json.')
    ours = _read(folder / "graftune_task.json") or {}
    spec = base or ours.get("base") or config.get("base_model_name_or_path")
    if not spec:
        raise FormatError(f'"{folder}" names no base model; say which with --base.')
    task = _OURS.get(str(ours.get("task"))) or _TASKS.get(str(config.get("task_type")))
    labels = (ours.get("labels") or _labels(folder)) if task == "classification" else None
    loaded = load_base(str(spec), task or "causal-lm", labels=labels)
    if ours.get("chat_template"):
        loaded.tokenizer.chat_template = ours["chat_template"]
    return loaded


def _labels(folder: Path) -> list[str] | None:
    """Returns made-up names for the classes of a directory that keeps only their tensors."""
    from graftune.formats.inspecting import inspect

    heads = [entry for entry in inspect(folder).tensors if "lora_" not in entry.name]
    widths = [entry.shape[0] for entry in heads if len(entry.shape) == 2]
    return [f"LABEL_{index}" for index in range(widths[-1])] if widths else None


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FormatError(f"{path} is not JSON: {error}.") from None
