"""The runs of a comparison: which methods, with which settings, as trials and for each seed."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from graftune.compare.settings import CompareSettings, MemberSettings
from graftune.errors import SettingsError
from graftune.tasks.in_context import is_in_context
from graftune.tasks.settings import RunSettings, TrainSettings

Kind = Literal["adapter", "probe", "in-context"]

PROMPTED = ("batch_size", "precision")
"""The settings of training that prompts have a use for, besides the seed."""


@dataclass(frozen=True)
class Member:
    """One method of a comparison."""

    label: str
    """What it is called."""
    slug: str
    """The same as a folder's name."""
    kind: Kind
    method: dict[str, Any]
    train: dict[str, Any]
    """The settings of training that are given, for all or for this one."""
    seeds: tuple[int, ...]
    """One alone where nothing is drawn, so that all would be the same."""


@dataclass(frozen=True)
class Cell:
    """One run of a member: a trial of a learning rate, or what counts."""

    member: Member
    seed: int
    settings: RunSettings
    multiple: float | None = None
    """Of a trial: of the method's learning rate."""
    hashes: dict[str, str] = field(default_factory=dict[str, str])
    """Of the data's files."""

    @property
    def is_trial(self) -> bool:
        """Whether it only chooses a learning rate."""
        return self.multiple is not None

    @property
    def key(self) -> str:
        """What tells it from every run with other settings or data."""
        said = self.settings.to_dict()
        told = {name: value for name, value in said.items() if name not in ("out", "name")}
        parts = [self.member.kind, self.is_trial, told, self.hashes]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]

    @property
    def title(self) -> str:
        """What it is called while it runs."""
        if self.is_trial:
            return f"{self.member.label}, trying learning rate {self.settings.train.lr:g}"
        several = len(self.member.seeds) > 1
        return f"{self.member.label}, seed {self.seed}" if several else self.member.label


def members_of(settings: CompareSettings) -> list[Member]:
    """Returns the members of a comparison, each under a name of its own.

    Raises:
        SettingsError: Two are the same, or a member's training is none.
    """
    labels = _labels(settings.methods)
    slugs = [_slug(label) for label in labels]
    for found in (labels, slugs):
        twice = next((one for one, count in Counter(found).items() if count > 1), None)
        if twice is not None:
            raise SettingsError(
                f'methods: two are called "{twice}"; give one of them another label.'
            )
    return [
        _member(one, label, slug, settings)
        for one, label, slug in zip(settings.methods, labels, slugs, strict=True)
    ]


def run_settings(settings: CompareSettings, member: Member, seed: int, **train: Any) -> RunSettings:
    """Returns the settings of a member's run, as `graftune train` takes them.

    Raises:
        SettingsError: A setting can't be.
    """
    given = {**member.train, **train, "seed": seed}
    return RunSettings.from_dict(
        {
            "base": settings.base,
            "task": settings.task,
            "task_options": settings.task_options,
            "data": settings.data.model_dump(mode="json"),
            "method": member.method,
            "train": {key: value for key, value in given.items() if value is not None},
            "out": str(settings.folder / "runs" / f"{member.slug}-seed{seed}"),
            "name": member.slug,
        },
        lambda _: f"methods, {member.label}",
    )


def trial_settings(
    settings: CompareSettings, whole: RunSettings, multiple: float, steps: int
) -> RunSettings:
    """Returns the settings of a trial: another learning rate, and a share of the steps or time.

    Args:
        settings: The comparison's.
        whole: The run's that it is a trial for, every default filled in.
        multiple: Of its learning rate.
        steps: Of the whole run.
    """
    seconds = whole.train.seconds
    return whole.replaced(
        train={
            "lr": rated(whole, multiple),
            "epochs": None,
            "steps": max(1, math.ceil(steps * settings.trial)),
            "seconds": seconds * settings.trial if seconds else None,
        },
        out=f"{whole.out}-trial{multiple:g}",
    )


def rated(whole: RunSettings, multiple: float) -> float:
    """Returns a multiple of a run's learning rate, without the last bits of the product."""
    return float(f"{(whole.train.lr or 0.0) * multiple:.6g}")


def _member(given: MemberSettings, label: str, slug: str, settings: CompareSettings) -> Member:
    plain = _plain(given.name)
    kind: Kind = "adapter"
    method: dict[str, Any] = {"name": given.name, **given.own}
    if plain in ("probe", "linearprobe"):
        kind = "probe"
    elif is_in_context(method):
        kind = "in-context"
        if plain == "hardprompt":
            method = {"shots": 0, **method}
        method["name"] = "in-context"
    elif plain == "full":
        method["name"] = "FullFineTuning"
    train = _training(settings, given, label)
    if kind == "in-context":
        train = {key: value for key, value in train.items() if key in PROMPTED}
    draws = kind == "adapter" or (kind == "in-context" and method.get("shots") != 0)
    seeds = settings.seeds if draws else settings.seeds[:1]
    return Member(label, slug, kind, method, train, seeds)


def _training(settings: CompareSettings, given: MemberSettings, label: str) -> dict[str, Any]:
    known = TrainSettings.model_fields
    unknown = next((key for key in given.train if key not in known), None)
    if unknown is not None:
        from graftune.errors import nearest

        raise SettingsError(
            f"methods, {label}: train.{unknown}: unknown key.{nearest(unknown, known)}"
        )
    budget = settings.budget.model_dump(include={"steps", "epochs", "seconds"})
    said = settings.train.model_dump(mode="json", exclude_unset=True)
    fixed = [key for key, value in budget.items() if value is not None and key in given.train]
    if fixed:
        raise SettingsError(
            f"methods, {label}: train.{fixed[0]} is {given.train[fixed[0]]!r}, but the budget is "
            f"{settings.budget} for all."
        )
    return {**said, **{k: v for k, v in budget.items() if v is not None}, **given.train}


def _labels(methods: tuple[MemberSettings, ...]) -> list[str]:
    names = Counter(_plain(one.name) for one in methods)
    return [
        one.label or (one.name if names[_plain(one.name)] == 1 else _with_settings(one))
        for one in methods
    ]


def _with_settings(one: MemberSettings) -> str:
    said: Mapping[str, Any] = {**one.own, **one.train}
    told = ", ".join(f"{key}={value}" for key, value in said.items())
    return f"{one.name} {told}".strip()


def _slug(label: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", label).strip("-").lower() or "method"


def _plain(name: str) -> str:
    return "".join(filter(str.isalnum, name.lower()))
