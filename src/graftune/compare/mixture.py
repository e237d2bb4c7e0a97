"""One data set made of several tasks', on which one prompt is trained (SPoT's mixture).

    rows of task t = min(e_t, K)       e_t training rows, K the cap: examples-proportional mixing

Where e_t > K the K rows are drawn once, without replacement. What the tasks share is the prompt:

    choices          every row brings its choices; the language model's head is shared
    instruct         conversations; the language model's head is shared
    classification   the task `multitask`: labels "TASK/LABEL", a head for each task

Validation rows are the target's. Sources: Vu et al. 2022, arXiv 2110.07904, section 5; Raffel et
al. 2020, arXiv 1910.10683, section 3.5.2, the mixing.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftune.errors import DataError, SettingsError

if TYPE_CHECKING:
    from graftune.tasks.data import Example
    from graftune.tasks.settings import RunSettings

CAP = 2**19
"""Rows of one task at most, as in the paper."""
DATA = "mixture-data"
"""The data's folder."""

Row = dict[str, Any]
_Written = Callable[[str, "Example", "RunSettings", Sequence[str]], Row]


@dataclass(frozen=True)
class Mixture:
    """Rows of several tasks, for one run."""

    settings: RunSettings
    """Of the target's runs."""
    rows: Mapping[str, list[Row]]
    """The training rows of each task, the target's last."""
    validation: list[Row]

    @property
    def counts(self) -> dict[str, int]:
        """How many training rows each task has in it."""
        return {name: len(rows) for name, rows in self.rows.items()}

    def write(self, folder: Path) -> RunSettings:
        """Writes the data, and returns the settings of the run on it, named `mixture`."""
        from graftune.tasks.workspace import write_lines

        place = folder / DATA
        place.mkdir(parents=True, exist_ok=True)
        write_lines(place / "train.jsonl", [row for rows in self.rows.values() for row in rows])
        (place / "validation.jsonl").unlink(missing_ok=True)
        if self.validation:
            write_lines(place / "validation.jsonl", self.validation)
        columns = dict.fromkeys(self.settings.data.columns.model_dump())
        is_classified = self.settings.task == "classification"
        own = () if is_classified else self.settings.task_options.items()
        options = {key: value for key, value in own if key != "words"}
        data = self.settings.to_dict()["data"] | {
            "train": str(place),
            "validation": None,
            "test": None,
            "columns": columns,
            "validation_fraction": 0,
            "test_fraction": 0,
        }
        changed = {
            "name": "mixture",
            "out": str(folder / "mixture"),
            "start": None,
            "task": "multitask" if is_classified else self.settings.task,
            "task_options": options,
            "data": data,
        }
        return type(self.settings).from_dict(self.settings.to_dict() | changed)


def check_kinds(target: RunSettings, sources: Mapping[str, RunSettings]) -> None:
    """Checks that tasks can share one prompt's training.

    Raises:
        SettingsError: One is of another kind than the target, or of a kind that can't be mixed.
    """
    if target.task not in _WRITTEN:
        raise SettingsError(
            f'how="mixture": the target\'s task is {target.task}; tasks of these kinds can be '
            f"mixed: {', '.join(_WRITTEN)}."
        )
    for name, settings in sources.items():
        if settings.task != target.task:
            raise SettingsError(
                f'how="mixture": the source "{name}" is of the task {settings.task} and the target '
                f"of {target.task}. Tasks of one kind alone share a head and a loss: leave it out, "
                'or take how="average", which mixes no data.'
            )


def mixed(
    target: RunSettings, sources: Mapping[str, RunSettings], own: str, cap: int = CAP
) -> Mixture:
    """Returns the mixture of a target's and of sources' training rows; nothing is written.

    Args:
        target: settings of the target's runs.
        sources: those of the sources' runs, by name.
        own: the target's name among them.
        cap: rows of one task at most.

    Raises:
        SettingsError: a task is of another kind.
        DataError: a task's data isn't there any more, or doesn't go with the target's.
    """
    check_kinds(target, sources)
    rows, validation = dict[str, list[Row]](), list[Row]()
    for name, settings in {**sources, own: target}.items():
        splits, labels = _read(name, settings)
        kept = _capped(splits["train"], cap, f"{name} {target.train.seed}")
        write = _WRITTEN[settings.task]
        rows[name] = [write(name, example, settings, labels) for example in kept]
        if name == own:
            held = splits.get("validation", ())
            validation = [write(name, example, settings, labels) for example in held]
    paired = {name: "text_pair" in found[0] for name, found in rows.items()}
    if len(set(paired.values())) > 1:
        pairs = ", ".join(f'"{name}"' for name, is_pair in paired.items() if is_pair)
        raise DataError(
            f"{pairs} has pairs of texts and the others single ones: a mixture of classifications "
            "has one form of text."
        )
    return Mixture(target, rows, validation)


def _read(name: str, settings: RunSettings) -> tuple[dict[str, Sequence[Example]], Sequence[str]]:
    """Returns a task's splits and labels."""
    from graftune.tasks.data import load
    from graftune.tasks.task import find_task

    task = find_task(settings.task, settings.task_options)
    try:
        splits = dict[str, "Sequence[Example]"](load(settings.data, task).splits)
        return splits, task.labels(splits)
    except DataError as error:
        raise DataError(
            f'the training data of "{name}" can\'t be mixed in: {error} Where it lies elsewhere '
            f"now, say so in a settings file: --source-settings {name}=FILE."
        ) from error


def _capped(examples: Sequence[Example], cap: int, seed: str) -> list[Example]:
    if len(examples) <= cap:
        return list(examples)
    kept = sorted(random.Random(seed).sample(range(len(examples)), cap))
    return [examples[index] for index in kept]


def _classified(name: str, example: Example, settings: RunSettings, labels: Sequence[str]) -> Row:
    texts = {role: example.fields[role] for role in ("text", "text_pair") if role in example.fields}
    return {**texts, "label": f"{name}/{example.stratum}"}


def _chosen(name: str, example: Example, settings: RunSettings, labels: Sequence[str]) -> Row:
    """Returns a text with its choices as the model says them."""
    words: Mapping[str, str] = settings.task_options.get("words") or {}
    fields = example.fields
    names = [words.get(label, label) for label in fields.get("choices") or labels]
    right = words.get(fields["answer"], fields["answer"])
    texts = [fields[role] for role in ("text", "text_pair") if role in fields]
    return {"text": "\n".join(texts), "choices": json.dumps(names), "label": right}


def _conversed(name: str, example: Example, settings: RunSettings, labels: Sequence[str]) -> Row:
    return {"messages": example.fields["messages"]}


_WRITTEN: dict[str, _Written] = {
    "classification": _classified,
    "choices": _chosen,
    "instruct": _conversed,
}
