"""Adapters of one task on one base that vote on each answer (Lester et al. 2021, section 6).

    member 1 ── p_1 ─┐
    member 2 ── p_2 ─┼── gt.vote ── shares of each label
    member 3 ── p_3 ─┘

The base is loaded once and the members answer one after another, each with its own head, so that a
vote takes one adapter's memory and a member answers as it does alone, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftune.errors import SettingsError, nearest
from graftune.tasks import dropping
from graftune.tasks.data import Example
from graftune.tasks.measured import Measured
from graftune.tasks.predicting import Predictor, adapter_folder, answer
from graftune.tasks.task import Ready
from graftune.tasks.workspace import PROMPT, SETTINGS, read_settings, read_task

if TYPE_CHECKING:
    from graftune.tasks.task import Task

HOW = ("majority", "mean")
_ALIKE = ("base", "task", "task_options", "labels", "precision", "chat_template")


@dataclass(frozen=True)
class Member:
    """One of those that vote."""

    path: str
    name: str
    """The adapter's, on the shared model."""
    ready: Ready
    """The shared model, with the length that this member was trained with."""
    drop: dropping.Drop
    """Lowest blocks in which it is left out."""


@dataclass(frozen=True)
class Ensemble:
    """Adapters of one task on one base, and how they vote."""

    members: tuple[Member, ...]
    task: Task
    columns: dict[str, str]
    """The columns of the data that the first was trained on."""
    how: str

    @classmethod
    def load(
        cls, directories: Sequence[str | Path], how: str = "majority", *, drop: int | None = None
    ) -> Ensemble:
        """Returns what runs' or adapters' directories describe, on one base.

        Args:
            directories: two or more.
            how: "majority" or "mean", as `gt.vote`.
            drop: Lowest blocks in which nothing acts; None for what each was trained for.

        Raises:
            FormatError: A directory is not a finished run's or an adapter's, or doesn't fit.
            SettingsError: They can't vote together.
        """
        told = _checked(directories, how)
        first, *others = map(str, directories)
        predictor = Predictor.load(first, drop=drop)
        ready = predictor.ready
        names = [_only(ready.model), *(f"member-{n}" for n in range(2, len(told) + 1))]
        for path, name in zip(others, names[1:], strict=True):
            _load(ready.model, Path(path), name)
        members = tuple(
            Member(path, name, replace(ready, max_length=said["max_length"]), _drop(said, drop))
            for (path, said), name in zip(told.items(), names, strict=True)
        )
        return cls(members, predictor.task, predictor.columns, how)

    @property
    def ready(self) -> Ready:
        """The first member's."""
        return self.members[0].ready

    def predict(
        self, rows: Sequence[str | Mapping[str, Any]], batch_size: int = 32
    ) -> list[dict[str, Any]]:
        """Returns an answer for each text or row, with what each member said (`members`).

        Raises:
            DataError: A row can't be asked.
        """
        asked = Predictor(self.task, self.ready, self.columns)
        examples = [asked.question(row, f"row {n}") for n, row in enumerate(rows, start=1)]
        return self._voted(self._answers(examples, batch_size))

    def measure(
        self, examples: Sequence[Example], batch_size: int
    ) -> tuple[Measured, dict[str, Measured]]:
        """Returns the vote's metrics, and each member's by its directory."""
        said = self._answers(examples, batch_size)
        labels = self.ready.labels
        alone = {
            member.path: self.task.measure(examples, answers, labels)
            for member, answers in zip(self.members, said, strict=True)
        }
        return self.task.measure(examples, self._voted(said), labels), alone

    def _answers(self, examples: Sequence[Example], batch_size: int) -> list[list[dict[str, Any]]]:
        """Returns each member's answers."""
        found: list[list[dict[str, Any]]] = []
        for member in self.members:
            with _acting(member):
                found.append(answer(self.task, member.ready, examples, batch_size))
        return found

    def _voted(self, said: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
        return [_vote(row, self.how) for row in zip(*said, strict=True)]


def _vote(said: Sequence[Mapping[str, Any]], how: str) -> dict[str, Any]:
    """Returns what the members' answers to one row come to."""
    import torch

    from graftune.voting import vote

    labels = list(said[0]["probabilities"])
    chances = torch.tensor(
        [[one["probabilities"][label] for label in labels] for one in said], dtype=torch.float64
    )
    shares = vote(chances.log(), len(said), how)[0].tolist()
    best = max(range(len(labels)), key=shares.__getitem__)
    return {
        **said[0],
        "label": labels[best],
        "score": shares[best],
        "probabilities": dict(zip(labels, shares, strict=True)),
        "members": [one["label"] for one in said],
    }


def check_same_rows(directories: Sequence[str | Path]) -> None:
    """Checks that runs held out the same rows, so that the first's measure the others fairly.

    Raises:
        SettingsError: One was trained on other data, or held out others.
    """
    splits: dict[str, Any] = {}
    for given in map(Path, directories):
        if (given / SETTINGS).is_file():
            data = read_settings(given).data.model_dump(exclude={"max_length", "columns"})
            splits[str(given)] = data
    if splits:
        first, *others = splits
        for other in others:
            key = next((k for k in splits[first] if splits[first][k] != splits[other][k]), None)
            if key is not None:
                raise SettingsError(
                    f'data.{key} is {splits[first][key]!r} in "{first}" and {splits[other][key]!r} '
                    f'in "{other}": rows that one held out the other may have been trained on. '
                    "Give rows that none has seen (--data)."
                )


def _checked(directories: Sequence[str | Path], how: str) -> dict[str, dict[str, Any]]:
    """Returns what each directory says, once they are known to go together."""
    from graftune.tasks.task import find_task

    if how not in HOW:
        raise SettingsError(
            f'vote is "{how}", expected one of {", ".join(HOW)}.{nearest(how, HOW)}'
        )
    told, seen = dict[str, dict[str, Any]](), set[Path]()
    for given in map(Path, directories):
        path = str(given)
        told[path] = read_task(given)
        place = adapter_folder(given).resolve()
        if place in seen:
            raise SettingsError(f'"{path}" is given twice: each adapter has one vote.')
        seen.add(place)
        _check_kind(given, told[path])
    if len(told) < 2:
        raise SettingsError("a vote needs two adapters or more: name the others (--with).")
    first, *others = told
    for other in others:
        _check_alike(first, told[first], other, told[other])
    if not find_task(told[first]["task"], told[first].get("task_options")).picks:
        raise SettingsError(
            f'"{first}" is of the task {told[first]["task"]}, which writes its answers: only '
            "labels and choices can be voted on."
        )
    return told


def _check_kind(given: Path, told: Mapping[str, Any]) -> None:
    if (adapter_folder(given) / PROMPT).is_file():
        raise SettingsError(f'"{given}" holds prompts in words, no adapter: it has no vote.')
    if told.get("beside"):
        raise SettingsError(
            f'"{given}" attends to other adapters ({", ".join(told["beside"])}): a fusion has no '
            "vote."
        )


def _check_alike(first: str, one: Mapping[str, Any], other: str, two: Mapping[str, Any]) -> None:
    for key in _ALIKE:
        values = [_plain(key, told.get(key)) for told in (one, two)]
        if values[0] != values[1]:
            raise SettingsError(
                f'{key} is {one.get(key)!r:.120} in "{first}" and {two.get(key)!r:.120} in '
                f'"{other}": adapters vote together on one base, with one task and its labels.'
            )


def _plain(key: str, value: Any) -> Any:
    """Returns a value as it is compared: one folder by any path, options with no defaults."""
    if key == "base" and Path(value).is_dir():
        return str(Path(value).resolve())
    return value or None


def _only(model: Any) -> str:
    from graftune.adapter import adapters

    [name] = adapters(model)
    return name


def _load(model: Any, directory: Path, name: str) -> None:
    from graftune.formats import load

    load(model, adapter_folder(directory), name)


def _drop(told: Mapping[str, Any], drop: int | None) -> dropping.Drop:
    return told.get("drop", 0) if drop is None else drop


def _acting(member: Member) -> AbstractContextManager[Any]:
    from graftune.adapter import using

    drop = dropping.schedule(member.drop) if member.drop else 0
    return using(member.ready.model, member.name, drop=drop)
