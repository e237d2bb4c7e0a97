"""What is in data before anything is trained on it: the report of training, and what it leaves out.

Rows that training refuses are counted instead, so that one look finds all of them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from graftune.errors import DataError
from graftune.tasks.chat import IGNORED, end_tokens
from graftune.tasks.data import DataReport, Example, Loaded, read_tables, split_up
from graftune.tasks.guessing import describe_columns, guess_task
from graftune.tasks.resolving import check_roles, length_limit
from graftune.tasks.settings import RunSettings
from graftune.tasks.sources import BadSplits
from graftune.tasks.tables import Table
from graftune.tasks.task import Encoded, Ready, Task, find_task

BARS = 12
"""Bars of a histogram."""
SHOWN = 5
"""Pairs of rows that are named."""
UNEVEN = 10
"""How many times as many rows the commonest label has as the rarest where that is said."""


@dataclass
class Look:
    """What was found."""

    task: str
    """The task that the rows were read for."""
    guessed: bool
    """Whether it was told from the columns."""
    other_tasks: dict[str, dict[str, str]]
    """Other tasks that could use them, and the column of each role."""
    columns: list[dict[str, Any]]
    """Each column: `column, role, types, distinct, empty, could_be, example`."""
    data: DataReport
    """What training reports of its data."""
    problems: list[str] = field(default_factory=list[str])
    """Why training would refuse the data, a sentence each; [] where it wouldn't."""
    notes: list[str] = field(default_factory=list[str])
    """What a user should know besides, a sentence each."""
    rare: list[str] = field(default_factory=list[str])
    """Labels with a single training row."""
    pairs: list[str] = field(default_factory=list[str])
    """Some rows with the same text in two splits, or with different labels."""
    entities: dict[str, int] = field(default_factory=dict[str, int])
    """Entities of each type in the training rows (labelling)."""
    percentiles: dict[str, dict[str, int]] = field(default_factory=dict[str, dict[str, int]])
    """Tokens of each split: "p50", "p90", "p95", "p99", "max"."""
    histogram: list[dict[str, int]] = field(default_factory=list[dict[str, int]])
    """Training rows by their tokens: `from, to, rows`."""
    trained: dict[str, float] = field(default_factory=dict[str, float])
    """Of instructions: `share` of the tokens that are trained on, and `unended`, the training rows
    whose last trained token is no end token."""

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as nested dictionaries of plain values."""
        return asdict(self)


def look(settings: RunSettings, *, task: str | None = None, with_base: bool = True) -> Look:
    """Returns what is in a run's data, without training or loading weights.

    Args:
        settings: Of these the data, the columns, and the base whose tokens are counted.
        task: What the rows are for; None: told from the columns.
        with_base: Whether there is a base to count tokens with.

    Raises:
        DataError: The data can't be read, or no row of it can be used.
        SettingsError: A setting can't be.
    """
    bad: BadSplits = {}
    tables = read_tables(settings.data, bad)
    train = tables["train"]
    guess = guess_task(train, settings.data.columns) if task is None else None
    chosen = find_task(task or (guess.task if guess else ""), settings.task_options)
    check_roles(settings, chosen)
    others = {name: fit for name, fit in (guess.fits if guess else {}).items()}
    others.pop(chosen.name, None)
    described = describe_columns(train, chosen.columns(train, settings.data.columns))
    del train  # its rows are to go once they are read
    loaded, problems = _loaded(tables, settings, chosen, bad)
    found = Look(chosen.name, task is None, others, described, loaded.report, problems)
    if not settings.data.skip_bad:
        for split, rows in bad.items():
            one = [f"{rows.count} {split} rows can't be used; data.skip_bad: true leaves them out."]
            found.problems.extend(one if rows.count else [])
    _look_at_labels(found, loaded.splits)
    found.pairs = _pairs(loaded.splits)
    labels = _labels(chosen, loaded.splits, found)
    if with_base and not chosen.reads_images:
        _look_at_tokens(found, settings, chosen, loaded.splits, labels)
    found.notes[:0] = loaded.report.notes
    return found


def _loaded(
    tables: dict[str, Table], settings: RunSettings, task: Task, bad: BadSplits
) -> tuple[Loaded, list[str]]:
    """Returns the splits as training makes them; where it can't, all rows, and why."""
    try:
        return split_up(tables, settings.data, task, bad), []
    except DataError as error:
        whole = settings.replaced(data={"validation_fraction": 0.0, "test_fraction": 0.0}).data
        again: BadSplits = {}
        # Read once more, as the tables are taken apart; only where something is wrong.
        loaded = split_up(read_tables(settings.data, again), whole, task, again)
        return loaded, [str(error)]


def _labels(task: Task, splits: Mapping[str, list[Example]], found: Look) -> list[str]:
    """Returns the labels as training numbers them; where it refuses them, all that there are."""
    try:
        return task.labels(splits)
    except DataError as error:
        found.problems.append(str(error))
    everything = [example for examples in splits.values() for example in examples]
    try:
        return task.labels({"train": everything})
    except DataError:
        return sorted({example.stratum for example in everything})


def _look_at_labels(found: Look, splits: Mapping[str, Sequence[Example]]) -> None:
    from graftune.tasks.bio import entities

    counts = found.data.labels.get("train", {})
    found.rare = [label for label, count in counts.items() if count == 1]
    if found.rare:
        found.notes.append(f"{len(found.rare)} labels have a single training row.")
    if counts and max(counts.values()) >= UNEVEN * min(counts.values()):
        most, least = max(counts, key=counts.__getitem__), min(counts, key=counts.__getitem__)
        found.notes.append(
            f'"{most}" has {counts[most]} training rows, "{least}" {counts[least]}: accuracy says '
            "little of the rare labels, macro F1 more; task_options.class_weights: balanced counts "
            "them more."
        )
    if found.task == "labelling":
        types = (one.type for row in splits["train"] for one in entities(row.fields["tags"]))
        found.entities = dict(sorted(Counter(types).items()))


def _pairs(splits: Mapping[str, Sequence[Example]]) -> list[str]:
    """Returns places of rows of one text that are in two splits, or have two labels."""
    first: dict[str, dict[str, Example]] = {}
    said: dict[str, list[str]] = defaultdict(list)
    for split, examples in splits.items():
        known = list(first.items())
        own = first[split] = {}
        for example in examples:
            other, before = _first(example, known) or (split, example)
            if other == split:
                before = own.setdefault(example.key, example)
            if before.stratum != example.stratum:
                kind = f'labels "{before.stratum}" and "{example.stratum}"'
            elif other != split:
                kind = f"in {other} and {split}"
            else:
                continue
            few = said["labels" if kind.startswith("labels") else "splits"]
            if len(few) < SHOWN:
                few.append(f"{before.where} = {example.where} ({kind})")
    return [*said["labels"], *said["splits"]]


def _first(
    example: Example, splits: Sequence[tuple[str, Mapping[str, Example]]]
) -> tuple[str, Example] | None:
    """Returns the first split that has an example's text, and the first row there."""
    return next(((split, rows[example.key]) for split, rows in splits if example.key in rows), None)


def _look_at_tokens(
    found: Look,
    settings: RunSettings,
    task: Task,
    splits: Mapping[str, Sequence[Example]],
    labels: list[str],
) -> None:
    from graftune.tasks.models import load_shell

    model, tokenizer = load_shell(settings.base)
    found.notes.extend(task.prepare(tokenizer))
    ready = Ready(model, tokenizer, labels, length_limit(settings, task, model, tokenizer))
    for split, examples in splits.items():
        encoded = task.encode(examples, ready)
        found.data.measure(split, encoded.lengths, ready.max_length, encoded.cut)
        found.notes.extend(f"{split.capitalize()}: {note}" for note in encoded.notes)
        marks = np.percentile(encoded.lengths, [50, 90, 95, 99, 100], method="nearest")
        names = ("p50", "p90", "p95", "p99", "max")
        found.percentiles[split] = {
            name: int(mark) for name, mark in zip(names, marks, strict=True)
        }
        if split == "train":
            found.histogram = histogram(encoded.lengths)
            if task.name == "instruct":
                _look_at_answers(found, encoded, ready)


def histogram(lengths: Sequence[int], bars: int = BARS) -> list[dict[str, int]]:
    """Returns how many rows have so many tokens, in bars of one width.

    Example:
        >>> histogram([1, 2, 2, 4], bars=2)
        [{'from': 1, 'to': 2, 'rows': 3}, {'from': 3, 'to': 4, 'rows': 1}]
    """
    least, most = min(lengths), max(lengths)
    width = -(-(most - least + 1) // bars)
    counts = Counter((length - least) // width for length in lengths)
    return [
        {"from": least + bar * width, "to": least + (bar + 1) * width - 1, "rows": counts[bar]}
        for bar in range(max(counts) + 1)
    ]


def _look_at_answers(found: Look, encoded: Encoded, ready: Ready) -> None:
    ends = end_tokens(ready.tokenizer, ready.model)
    trained = tokens = unended = 0
    for row in encoded.features:
        labels = [label for label in row["labels"] if label != IGNORED]
        trained, tokens = trained + len(labels), tokens + len(row["labels"])
        unended += not labels or labels[-1] not in ends
    found.trained = {"share": trained / tokens, "unended": unended}
    if unended:
        found.notes.append(
            f"In {unended} of {len(encoded.features)} training rows the last trained token is no "
            "end token: from these the model doesn't learn to stop."
        )
