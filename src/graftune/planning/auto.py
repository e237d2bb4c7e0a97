"""`method: auto`: facts of a run's data and base, a choice by them, and what its memory asks for.

The settings that come out name a method and all that was chosen, so that the run's file says what
was done and another machine does the same.
"""

from __future__ import annotations

import dataclasses
import heapq
from dataclasses import dataclass
from typing import Any

import torch

from graftune.errors import GraftuneError, SettingsError
from graftune.planning.asking import plan_settings
from graftune.planning.choosing import Choice, Facts, choose, told
from graftune.planning.fitting import fitted, train_settings
from graftune.planning.planned import chosen, planned
from graftune.planning.settings import PlanSettings
from graftune.planning.sizes import parse_bytes
from graftune.planning.skeletons import Base, base_of, is_encoder, meta_model
from graftune.tasks.data import Loaded, load
from graftune.tasks.models import load_shell
from graftune.tasks.quantising import Quantising
from graftune.tasks.resolving import length_limit, resolved
from graftune.tasks.settings import RunSettings
from graftune.tasks.task import Ready, Task, find_task

CHOOSING = "choices"
"""The task whose rows are several sequences each, so that a plan of one tells nothing."""
SPARING = {"name": "LadderSideTuning"}
"""What is taken where the choice doesn't fit: its backward pass stays out of the base."""
WAY_ON = (
    f"{SPARING['name']} was tried too: allow more with --memory, shorten rows with --max-length, "
    "or take a smaller base."
)
HOST_SHARE = 0.75
"""Of the host's memory, what a training may take where none is named: the system needs some."""
MEASURED = 256
"""Training rows with the most letters, whose tokens are counted."""


@dataclass(frozen=True)
class Chosen:
    """What was chosen for a run."""

    settings: RunSettings
    """The run's, with the choice in them."""
    choice: Choice


def chosen_for(settings: RunSettings, memory: str | int | None = None) -> Chosen:
    """Returns a run's settings with a method and settings that suit its data, base and memory.

    Settings of training that are given stay as they are. No weights are loaded.

    Args:
        settings: the run's, its method "auto".
        memory: what a step may take, such as "6GiB"; None: the GPU's, else most of the host's.

    Raises:
        SettingsError: nothing fits, "auto" has settings, or another setting can't be.
        DataError: the data can't be trained on.
        FormatError: the base can't be read.
    """
    _check(settings)
    size = None if memory is None else parse_bytes(memory, "--memory")
    task = find_task(settings.task, settings.task_options)
    if size is not None and task.name == CHOOSING:
        raise SettingsError(
            "--memory: each row of the task choices is several sequences, which isn't planned; "
            "leave it out."
        )
    data = load(settings.data, task)
    labels = task.labels(data.splits)
    base = base_of(settings.base, settings.task, max(len(labels), 2))
    first = choose(_facts(base, settings.task, len(data.splits["train"])), _given(settings))
    found = first
    if task.name != CHOOSING:
        longest = _longest(settings, task, data, labels)
        found = _fitting(settings, task, base, first, longest, size)
    return Chosen(settings.replaced(method=found.method, train=found.train), found)


def _check(settings: RunSettings) -> None:
    own = [key for key in settings.method if key != "name"]
    if own:
        raise SettingsError(
            f"method.{own[0]}: auto chooses a method's settings itself; name a method to set it."
        )


def _given(settings: RunSettings) -> list[str]:
    """Returns the settings of training that the user has made, which are left alone."""
    train = settings.train
    return [key for key in train.model_fields_set if getattr(train, key) is not None]


def _here() -> int:
    """Returns the bytes of the device that is trained on, the same in every process."""
    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(0).total_memory)
    import psutil

    return int(psutil.virtual_memory().total * HOST_SHARE)


def _facts(base: Base, task: str, rows: int) -> Facts:
    model = meta_model(base, torch.float32)
    linears: list[Any] = [one for one in model.modules() if isinstance(one, torch.nn.Linear)]
    return Facts(
        task=task,
        rows=rows,
        parameters=sum(one.numel() for one in model.parameters()),
        is_encoder=is_encoder(base),
        has_biases=2 * sum(one.bias is not None for one in linears) > len(linears),
    )


def _longest(settings: RunSettings, task: Task, data: Loaded, labels: list[str]) -> int:
    """Returns the tokens of the longest training row, as it is cut."""
    model, tokenizer = load_shell(settings.base)
    task.prepare(tokenizer)
    limit = length_limit(settings, task, model, tokenizer)
    rows = heapq.nlargest(MEASURED, data.splits["train"], key=lambda row: len(row.key))
    lengths = task.encode(rows, Ready(model, tokenizer, labels, limit)).lengths
    return min(max(lengths), limit)


def _fitting(
    settings: RunSettings, task: Task, base: Base, first: Choice, longest: int, size: int | None
) -> Choice:
    """Returns the first choice with what makes it fit, else what takes less than any other."""
    budget = _here() if size is None else size
    errors: list[GraftuneError] = []
    for choice in (first, _sparing(first)):
        try:
            asked = _asked(settings, task, choice, longest)
            fit = fitted(base, chosen(choice.method), asked, budget, way_on=WAY_ON)
            train = train_settings(fit.plan.settings) if fit.changes else {}
            _check_packages(train)
        except GraftuneError as error:
            errors.append(error)
        else:
            reasons = (*choice.reasons, *told(fit))
            return dataclasses.replace(choice, train=choice.train | train, reasons=reasons)
    why_not = _why_not(settings, task, base, first, longest)
    if why_not is not None and size is None:
        return dataclasses.replace(first, reasons=(*first.reasons, f"Not planned: {why_not}"))
    raise SettingsError(why_not or str(errors[0])) from errors[0]


def _why_not(
    settings: RunSettings, task: Task, base: Base, choice: Choice, longest: int
) -> str | None:
    """Returns why no plan can be made at all; None where one can, of whatever size."""
    try:
        planned(base, chosen(choice.method), _asked(settings, task, choice, longest))
    except GraftuneError as error:
        return str(error)
    return None


def _sparing(first: Choice) -> Choice:
    """Returns what takes least memory, trained as long as the first choice."""
    kept = {key: value for key, value in first.train.items() if key not in ("lr", "optimizer")}
    why = (
        f"LadderSideTuning: {first.method['name']} would not fit, and a side network's backward "
        "pass stays out of the base (Sung et al. 2022)."
    )
    return Choice(method=dict(SPARING), train=kept, reasons=(why,))


def _asked(settings: RunSettings, task: Task, choice: Choice, longest: int) -> PlanSettings:
    """Returns how a step would be trained if memory were no matter."""
    run = settings.replaced(method=choice.method, train=choice.train)
    run = resolved(run, task, chosen(choice.method))
    return plan_settings(run, {"length": longest})


def _check_packages(train: dict[str, Any]) -> None:
    if train.get("quantize"):
        Quantising(train["quantize"], train.get("double_quant", True)).check()
