"""What prediction needs besides an adapter or a prompt, as a run writes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from graftune.tasks import workspace
from graftune.tasks.data import Loaded
from graftune.tasks.resolving import precision
from graftune.tasks.settings import RunSettings
from graftune.tasks.task import Ready, Task


class Run(Protocol):
    """A run that has trained, or chosen its demonstrations."""

    settings: RunSettings
    task: Task
    data: Loaded
    labels: list[str]


def write_task(run: Run, ready: Ready, run_dir: Path, *, chats: bool, **more: Any) -> None:
    """Writes it into the run's directory and beside the adapter.

    Args:
        run: whose.
        ready: its model and tokenizer.
        run_dir: its directory.
        chats: whether texts go through the tokenizer's chat template, which is kept then.
        more: what this kind of run has besides.
    """
    told = {
        "task": run.task.name,
        "task_options": run.settings.task_options,
        "base": run.settings.base,
        "labels": run.labels,
        "max_length": ready.max_length,
        "columns": run.data.report.columns,
        "chat_template": ready.tokenizer.chat_template if chats else None,
        "precision": precision(run.settings),
        "quantize": run.settings.train.quantize,
        "double_quant": run.settings.train.double_quant,
        **more,
    }
    for directory in (run_dir / workspace.ADAPTER, run_dir):
        workspace.write_json(directory / workspace.TASK, told)
