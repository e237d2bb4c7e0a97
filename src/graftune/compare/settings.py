"""What a comparison is told: base, data, methods, seeds, and one budget for all of them.

Nothing here imports torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from graftune.errors import SettingsError
from graftune.tasks.settings import Columns, Count, DataSettings, Positive, TrainSettings
from graftune.tasks.settings_message import settings_message
from graftune.tasks.settings_overrides import apply_overrides, parse_override
from graftune.tasks.settings_yaml import KeyPath, dump, read_settings_file

__all__ = ["Budget", "Columns", "CompareSettings", "MemberSettings"]

DEFAULT_METHODS = ("probe", "BitFit", "IA3", "LoRA", "PfeifferAdapter", "full")
SEARCH = (0.3, 1.0, 3.0)
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "mib": 2**20, "gib": 2**30}


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class MemberSettings(BaseModel):
    """One method of a comparison: its name, and beside it the method's own settings."""

    model_config = ConfigDict(extra="allow", frozen=True, use_attribute_docstrings=True)

    name: str
    """A method's name, or a baseline: `probe`, `full`, `in-context`, `hard-prompt`."""
    label: str | None = None
    """What it is called in the report. Default: the name, with its settings where two share it."""
    train: dict[str, Any] = Field(default_factory=dict)
    """How it is trained, where that differs from the others."""

    @property
    def own(self) -> dict[str, Any]:
        """The method's own settings."""
        return dict(self.model_extra or {})


class Budget(_Section):
    """What each method may use; exactly one of these."""

    steps: Count | None = None
    """Optimiser steps."""
    epochs: Positive | None = None
    """Passes over the training data."""
    seconds: Positive | None = None
    """Wall time of training; what takes longer is stopped, with its best so far."""
    parameters: Positive | None = None
    """Trained parameters, below 1 as a share of the base's; what trains more is left out."""
    memory: int | None = None
    """Bytes of a run's own peak, or a text as "2 GB"; what takes more is left out."""

    @field_validator("memory", mode="before")
    @classmethod
    def _bytes(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        found = re.fullmatch(r"\s*([0-9.]+)\s*([A-Za-z]*)\s*", value)
        if found is None or found[2].lower() not in _UNITS:
            raise ValueError(f'expected bytes, as in "2 GB" or "500 MB", found {value!r}')
        return round(float(found[1]) * _UNITS[found[2].lower()])

    @model_validator(mode="after")
    def _one(self) -> Self:
        given = [key for key, value in self if value is not None]
        if len(given) > 1:
            raise ValueError(f"give one budget, found {' and '.join(given)}")
        return self

    def __str__(self) -> str:
        given = [f"{key} = {value:g}" for key, value in self if value is not None]
        return given[0] if given else "the task's own epochs"


class CompareSettings(_Section):
    """Everything that a comparison is told.

    Example:
        >>> s = CompareSettings(base="demo:minilm", data="mail.csv", methods=["lora", "bitfit"])
        >>> [one.name for one in s.methods], s.seeds, str(s.folder)
        (['lora', 'bitfit'], (0, 1, 2), 'runs/classification-compare')

    Raises:
        SettingsError: A key is unknown or missing, or a value can't be; it names the key, the
            value and the nearest right one.
    """

    base: str
    """The base model, as for a run."""
    task: str = "classification"
    """The task, as for a run."""
    task_options: dict[str, Any] = Field(default_factory=dict)
    """The task's own settings."""
    data: DataSettings
    """Where the data lies."""
    train: TrainSettings = TrainSettings()
    """How all are trained, unless a method says otherwise."""
    methods: tuple[MemberSettings, ...] = tuple(MemberSettings(name=n) for n in DEFAULT_METHODS)
    """Names, or `{name, label, train}` with the method's settings beside them."""
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0, 1, 2)
    """Seeds of weights, order and dropout: a run of each method for each. One number: so many."""
    budget: Budget = Budget()
    """What each method may use. Default: the task's epochs."""
    search: tuple[Positive, ...] = SEARCH
    """Multiples of a method's learning rate that are tried; the best on the validation rows is
    used for all seeds. Empty: no search."""
    trial: Annotated[float, Field(gt=0, le=1)] = 0.3
    """Share of a run's steps that a trial of a learning rate takes."""
    out: str | None = None
    """The comparison's folder. Default: `runs/NAME`."""
    name: str | None = None
    """Default: TASK-compare."""

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise SettingsError(settings_message(error, type(self))) from None

    @field_validator("data", mode="before")
    @classmethod
    def _train_alone(cls, value: Any) -> Any:
        return {"train": value} if isinstance(value, str) else value

    @field_validator("methods", mode="before")
    @classmethod
    def _names_alone(cls, value: Any) -> Any:
        given = [value] if isinstance(value, str | Mapping) else value
        if not isinstance(given, list | tuple) or not given:
            return given or [None]
        return [{"name": one} if isinstance(one, str) else one for one in given]

    @field_validator("seeds", mode="before")
    @classmethod
    def _so_many(cls, value: Any) -> Any:
        if isinstance(value, int) and not isinstance(value, bool):
            if value < 1:
                raise ValueError(f"expected one seed or more, found {value}")
            return tuple(range(value))
        return value

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(value)) < len(value):
            raise ValueError(f"expected different seeds, found {', '.join(map(str, value))}")
        return value

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        for key in ("steps", "epochs", "seconds"):
            if getattr(self.budget, key) is not None and getattr(self.train, key) is not None:
                raise ValueError(f"train.{key} and budget.{key}: give one of the two")
        if self.train.seed:
            raise ValueError(f"train.seed is {self.train.seed}: a comparison has seeds")
        return self

    @classmethod
    def from_dict(
        cls, values: Mapping[str, Any], where: Callable[[KeyPath], str] | None = None
    ) -> CompareSettings:
        """Returns settings from nested dictionaries; `where` puts a place before an error.

        Raises:
            SettingsError: As for the class.
        """
        made = cls.__new__(cls)
        try:
            cls.__pydantic_validator__.validate_python(dict(values), self_instance=made)
        except ValidationError as error:
            raise SettingsError(settings_message(error, cls, where)) from None
        return made

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: Iterable[str] = ()) -> CompareSettings:
        """Returns the settings of a YAML file, changed by `a.b=value` overrides.

        Raises:
            SettingsError: As for the class, with `file:line` before it; or the file can't be read.
        """
        file = read_settings_file(path)
        changes = [parse_override(text) for text in overrides]
        changed = {key for key, _ in changes}
        return cls.from_dict(
            apply_overrides(file.values, changes),
            lambda key: "--set" if key in changed else file.where(key),
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings as nested dictionaries of plain values."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """Returns the settings as a YAML file's text, which `from_yaml` reads."""
        return dump(self.to_dict())

    @classmethod
    def json_schema(cls) -> dict[str, Any]:
        """Returns the JSON schema of a settings file, for editors."""
        return cls.model_json_schema()

    @property
    def comparison_name(self) -> str:
        """The comparison's name."""
        return self.name or f"{self.task}-compare"

    @property
    def folder(self) -> Path:
        """The folder of everything that the comparison writes."""
        return Path(self.out) if self.out else Path("runs") / self.comparison_name
