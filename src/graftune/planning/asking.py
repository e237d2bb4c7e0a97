"""A question as the command line puts it: a settings file, flags, a budget, a file to write."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from graftune.errors import FormatError, SettingsError
from graftune.methods.base import Method
from graftune.planning.fitting import OFFLOAD_KEYS, TRAIN_KEYS, Fit, fitted, train_settings
from graftune.planning.planned import Plan, chosen, planned, shortened
from graftune.planning.settings import PlanSettings
from graftune.planning.sizes import parse_bytes
from graftune.planning.skeletons import Base, base_of
from graftune.tasks.settings import RunSettings
from graftune.tasks.settings_overrides import apply_overrides, parse_override

RUN_TASKS = {
    "classification": "classification",
    "token-classification": "labelling",
    "question-answering": "spans",
    "causal-lm": "instruct",
}
"""The tasks of `graftune train` that a base made for something is trained on."""


@dataclass(frozen=True)
class Answer:
    """A plan, of what base, and whether it was made to fit."""

    plan: Plan
    base: Base
    fit: Fit | None


def ask(
    config: Path | None,
    flags: Mapping[str, str | None],
    changes: Sequence[str],
    given: Mapping[str, Any],
    *,
    budget: str | None = None,
    out: Path | None = None,
) -> Answer:
    """Returns the answer to a question, and writes the settings file that it leads to.

    Args:
        config: a settings file of `graftune train`.
        flags: base, task, method and data, which change what the file says.
        changes: `method.r=16` and the like.
        given: settings of a plan, None for those not given.
        budget: memory that it must fit into.
        out: file to write.

    Raises:
        SettingsError: something can't be; nothing is written then.
    """
    run = RunSettings.from_yaml(config) if config is not None else None
    name = flags["base"] or (run.base if run else None)
    if not name:
        raise SettingsError("graftune plan needs a base model, as in --base demo:minilm.")
    size = None if budget is None else parse_bytes(budget, "--fit")
    method = _method(run, flags["method"], changes)
    asked = plan_settings(run, given)
    base = base_of(name, flags["task"] or (run.task if run else None), asked.labels)
    if given.get("length") is None and (run is None or run.data.max_length is None):
        asked = shortened(base, asked)
    data = flags["data"] or (run.data.train if run else None)
    if out is not None:
        _check_out(out, base, data)
    fit = None if size is None else fitted(base, method, asked, size, timed=True)
    plan = planned(base, method, asked, timed=True) if fit is None else fit.plan
    if out is not None:
        _write(out, _file(run, plan, str(name), str(data)))
    return Answer(plan, base, fit)


def _method(run: RunSettings | None, name: str | None, changes: Sequence[str]) -> Method:
    """Returns the method of a file or a flag, changed by --set."""
    values: dict[str, Any] = {"method": run.method if run else {"name": "LoRA"}}
    if name is not None and str(values["method"]["name"]).lower() != name.lower():
        values = {"method": {"name": name}}
    parsed = [parse_override(text) for text in changes]
    for key, _ in parsed:
        if key[0] != "method" or len(key) != 2:
            raise SettingsError(
                f"--set {'.'.join(key)}: here it sets the method, as in method.r=16; the rest has "
                "flags of its own."
            )
    return chosen(apply_overrides(values, parsed)["method"])


def plan_settings(run: RunSettings | None, given: Mapping[str, Any]) -> PlanSettings:
    """Returns a plan's settings: flags, else the file's, else the defaults."""
    device = given.get("device") or ("cuda" if torch.cuda.is_available() else "cpu")
    values: dict[str, Any] = {"device": device}
    if run is not None:
        train = run.train.model_dump()
        said = {name: train.get(key) for name, key in TRAIN_KEYS.items() if name != "precision"}
        if not said["quantize"]:
            said["double_quant"] = None
        values |= {name: value for name, value in said.items() if value is not None}
        moved = tuple(word for word, key in OFFLOAD_KEYS.items() if train.get(key))
        values["offload"] = moved if device == "cuda" else ()
        values["max_grad_norm"] = train["max_grad_norm"]
        values["length"] = run.data.max_length
        auto = "bfloat16" if device == "cuda" else "float32"
        values["precision"] = auto if train["precision"] == "auto" else train["precision"]
    return PlanSettings.of(**values | {k: v for k, v in given.items() if v is not None})


def _check_out(out: Path, base: Base, data: str | None) -> None:
    if base.task not in RUN_TASKS:
        raise SettingsError(
            f"--out writes settings for graftune train, which has no task for {base.task}."
        )
    if not data:
        raise SettingsError("--out writes a whole settings file: name the rows with --data FILE.")
    if not out.parent.is_dir():
        raise FormatError(f'--out is "{out}", but there is no folder {out.parent}.')


def _file(run: RunSettings | None, plan: Plan, base: str, data: str) -> RunSettings:
    """Returns a run's settings that say what a plan says."""
    settings = plan.method.to_dict()
    default = type(plan.method)().to_dict()
    method = {"name": settings.pop("method")} | {
        key: value for key, value in settings.items() if value != default.get(key)
    }
    train = train_settings(plan.settings)
    if run is not None:
        return run.replaced(base=base, method=method, train=train, data={"train": data})
    return RunSettings.from_dict(
        {
            "base": base,
            "task": RUN_TASKS[plan.task],
            "data": {"train": data, "max_length": plan.settings.length},
            "method": method,
            "train": train,
        }
    )


def _write(out: Path, settings: RunSettings) -> None:
    """Writes a settings file whole or not at all."""
    beside = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.write(settings.to_yaml())
            file.flush()
            os.fsync(file.fileno())
        beside.replace(out)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise FormatError(f'--out "{out}" can\'t be written: {error.strerror}.') from error
