"""From settings or a run's directory to what answers by prompts.

A run keeps in `adapter/` its settings and demonstrations as `prompt.json`, and where the nearest
are shown, the vectors of all that may be, as `vectors.safetensors`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from graftune.errors import FormatError, SettingsError
from graftune.tasks.chat_prompt import ChatPrompt
from graftune.tasks.data import Example
from graftune.tasks.in_context import Demonstrations, InContext, in_context_of, template_of
from graftune.tasks.measured import Measured
from graftune.tasks.models import LANGUAGE_MODEL, base_config
from graftune.tasks.predicting import measure_logits
from graftune.tasks.prompt_costs import PromptCosts
from graftune.tasks.ranking import RankedPrompt
from graftune.tasks.resolving import UNBOUNDED, most_tokens
from graftune.tasks.task import Ready, Task
from graftune.tasks.templates import Template
from graftune.tasks.workspace import PROMPT, write_json

if TYPE_CHECKING:
    from graftune.tasks.models import Base

VECTORS = "vectors.safetensors"
_LABELLED = ("template", "words", "combine", "length_normalised", "labels", "inputs", "format")
"""Settings of prompts that pick labels, which mean nothing where an answer is any text."""


class Prompt(Protocol):
    """What answers by prompts."""

    costs: PromptCosts

    def answers(
        self,
        examples: Sequence[Example],
        *,
        batch_size: int,
        max_new_tokens: int = ...,
        told: Callable[[int], None] | None = ...,
    ) -> list[dict[str, Any]]:
        """Returns the answer to each example, as its task's `answer` does."""
        ...


def check_task(settings: InContext, task: Task) -> None:
    """Checks that prompts can do a task, and that the settings are meant for it.

    Raises:
        SettingsError: They can't, or one is not.
    """
    if task.picks:
        return
    if task.model_task != "causal-lm":
        raise SettingsError(f"in-context learning can't do the task {task.name}.")
    plain = InContext()
    changed = [name for name in _LABELLED if getattr(settings, name) != getattr(plain, name)]
    changed += ["select"] if settings.select == "balanced" else []
    if changed:
        raise SettingsError(
            f"method.{changed[0]} is for tasks with labels; {task.name} answers freely, in the "
            "model's chat template."
        )


def base_of(
    spec: str,
    task: Task,
    settings: InContext,
    columns: Mapping[str, str],
    load: Callable[[str], Base],
) -> tuple[Base, Template | None]:
    """Returns a base ready to be prompted, and the template for it; None for a chat.

    Args:
        spec: The base.
        task: What is asked.
        settings: The prompts'.
        columns: The data's.
        load: Loads the base for a task of `load_base`.

    Raises:
        SettingsError: The template is not for this base.
        FormatError: The base can't be loaded so.
    """
    if not task.picks:
        return load(task.model_task), None
    template = template_of(settings, spec, base_config(spec), columns)
    kind = "masked-lm" if template.has("mask") else LANGUAGE_MODEL
    return load(kind), template


def prompt_of(
    settings: InContext, template: Template | None, ready: Ready, shown: Demonstrations
) -> RankedPrompt | ChatPrompt:
    """Returns what answers."""
    room = most_tokens(ready.model, ready.tokenizer) or UNBOUNDED
    if template is None:
        return ChatPrompt(settings, ready, shown, room)
    return RankedPrompt(settings, template, ready, shown, room)


def measure(
    prompt: RankedPrompt | ChatPrompt,
    task: Task,
    ready: Ready,
    examples: Sequence[Example],
    batch_size: int,
) -> Measured:
    """Returns the metrics of a prompt's answers."""
    if isinstance(prompt, ChatPrompt):
        return measure_logits(task, ready, prompt.features(examples), batch_size)
    answers = prompt.answers(examples, batch_size=batch_size)
    return task.measure(examples, answers, ready.labels)


def save(folder: Path, settings: InContext, shown: Demonstrations) -> None:
    """Writes what a prompt is made of.

    Raises:
        FormatError: The disk is full or the place can't be written.
    """
    folder.mkdir(exist_ok=True)
    if shown.vectors is not None:
        from safetensors.torch import save_file

        save_file({"vectors": shown.vectors.contiguous()}, folder / VECTORS)
    method = {"name": InContext.name, **settings.model_dump(mode="json")}
    write_json(folder / PROMPT, {"method": method, "demonstrations": shown.rows})


def read(folder: Path) -> tuple[InContext, Demonstrations]:
    """Returns what `save` wrote.

    Raises:
        FormatError: It isn't there or can't be read.
    """
    path = folder / PROMPT
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        settings = in_context_of(found["method"])
        rows = cast(list[dict[str, Any]], found["demonstrations"])
        vectors = None
        if (folder / VECTORS).is_file():
            from safetensors.torch import load_file

            vectors = load_file(folder / VECTORS)["vectors"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise FormatError(f'"{path}" can\'t be read: {error}.') from error
    if vectors is not None and len(vectors) != len(rows):
        raise FormatError(f'"{folder}" has {len(rows)} demonstrations, but {len(vectors)} vectors.')
    return settings, Demonstrations(rows, vectors)
