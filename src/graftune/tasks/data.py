"""From what the user calls data to training, validation and test examples, with a report.

Splits that aren't given are cut from the training data: stratified by label, the same for the
same seed, and rows with the same text always on the same side. What is odd is counted and said.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np

from graftune.errors import DataError
from graftune.tasks.bad_rows import BadRows
from graftune.tasks.columns import check_columns
from graftune.tasks.label_notes import label_notes
from graftune.tasks.settings import Columns, DataSettings
from graftune.tasks.sources import BadSplits, file_hashes, read_source, read_split
from graftune.tasks.tables import Table

AT_ONCE = 10_000
"""Rows that are there as rows and as examples at a time."""
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, slots=True)
class Example:
    """One row, as a task understands it."""

    fields: dict[str, Any]
    """What the task works with, JSON-able: `{"text", "label"}` or `{"messages"}`."""
    key: str
    """What makes two examples the same: their text, without case and spacing."""
    stratum: str
    """What splits are balanced by: the label, or ''."""
    where: str
    """The place it came from, for errors."""


class Reader(Protocol):
    """The part of a task that reads rows."""

    def columns(self, table: Table, named: Columns) -> dict[str, str]:
        """Returns the column of each role. Raises DataError when one is missing."""
        ...

    def examples(self, table: Table, columns: Mapping[str, str]) -> list[Example]:
        """Returns a table's rows as examples. Raises DataError for a row that can't be used."""
        ...

    def remarks(self, examples: Sequence[Example]) -> list[str]:
        """Returns what a user should know about a split's rows, a sentence each."""
        ...


@dataclass
class DataReport:
    """What was found in the data."""

    sources: dict[str, str] = field(default_factory=dict[str, str])
    """Where each split came from."""
    hashes: dict[str, str] = field(default_factory=dict[str, str])
    """SHA-256 of each file that was read."""
    columns: dict[str, str] = field(default_factory=dict[str, str])
    """The column of each role."""
    rows: dict[str, int] = field(default_factory=dict[str, int])
    """Rows of each split."""
    labels: dict[str, dict[str, int]] = field(default_factory=dict[str, dict[str, int]])
    """Rows of each label in each split."""
    duplicates: dict[str, int] = field(default_factory=dict[str, int])
    """Rows of each split whose text an earlier row of it has."""
    leaks: dict[str, int] = field(default_factory=dict[str, int])
    """Rows whose text also occurs in another split: "test in train", …"""
    contradictions: int = 0
    """Training texts that occur with different labels."""
    max_length: int = 0
    """The limit in tokens."""
    lengths: dict[str, dict[str, int]] = field(default_factory=dict[str, dict[str, int]])
    """Tokens before cutting: "median", "p90", "max" of each split."""
    cut: dict[str, int] = field(default_factory=dict[str, int])
    """Rows of each split that were cut to the limit."""
    left_out: dict[str, dict[str, int]] = field(default_factory=dict[str, dict[str, int]])
    """Rows of each source split that were left out because they are bad, by reason."""
    notes: list[str] = field(default_factory=list[str])
    """What a user should know, one sentence each."""

    def measure(self, split: str, lengths: Sequence[int], limit: int, cut: int | None) -> None:
        """Notes a split's lengths in tokens, and how many were cut: those longer, if it is None."""
        values = np.array(lengths)
        middle, high, most = np.percentile(values, [50, 90, 100], method="nearest")
        self.max_length = limit
        self.lengths[split] = {"median": int(middle), "p90": int(high), "max": int(most)}
        self.cut[split] = int((values > limit).sum()) if cut is None else cut

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as nested dictionaries of plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Loaded:
    """The examples of each split and what was found on the way."""

    splits: dict[str, list[Example]]
    """ "train" always, "validation" and "test" unless switched off."""
    report: DataReport


def load(settings: DataSettings, reader: Reader) -> Loaded:
    """Returns the examples of all splits, those that aren't given being made.

    Raises:
        DataError: The data can't be read or used.
    """
    bad: BadSplits | None = {} if settings.skip_bad else None
    return split_up(read_tables(settings, bad), settings, reader, bad)


def split_up(
    tables: dict[str, Table], settings: DataSettings, reader: Reader, bad: BadSplits | None = None
) -> Loaded:
    """Returns the examples of all splits of tables that were read; the tables are taken out.

    Rows that can't be used are counted in `bad`; without it they are errors.

    Raises:
        DataError: The data can't be used.
    """
    columns = reader.columns(tables["train"], settings.columns)
    for table in tables.values():
        check_columns(table, columns)
    report = DataReport(
        sources={split: table.source for split, table in tables.items()},
        hashes=_hashes(settings),
        columns=columns,
    )
    splits: dict[str, list[Example]] = {}
    for split in list(tables):
        # Rows go as they are read, so that rows and examples of all never coexist.
        table = tables.pop(split)
        report.notes.extend(label_notes(table, columns.get("label"), split))
        splits[split] = _examples(reader, table, columns, bad, split)
    for split, found in (bad or {}).items():
        report.left_out[split] = found.reasons
        report.notes.extend(found.notes(split))
    splits = _complete(splits, settings, report)
    _count(splits, report)
    for split, examples in splits.items():
        report.notes.extend(f"{split.capitalize()}: {note}" for note in reader.remarks(examples))
    return Loaded(splits, report)


def _examples(
    reader: Reader,
    table: Table,
    columns: Mapping[str, str],
    bad: BadSplits | None,
    split: str,
) -> list[Example]:
    """Returns a table's examples, whose rows go on the way; bad ones are counted in `bad`."""
    found: list[Example] = []
    counted = None if bad is None else bad.setdefault(split, BadRows())
    for part in table.taken(AT_ONCE):
        try:
            found.extend(reader.examples(part, columns))
        except DataError:
            if counted is None:
                raise
            found.extend(_good(reader, part, columns, counted))
    if counted is not None and not found:
        reason, where = next(iter(counted.places.items()))
        raise DataError(
            f"{where}: {reason} No row of {table.source} can be used: {counted.count} are bad."
        )
    return found


def _good(
    reader: Reader, table: Table, columns: Mapping[str, str], counted: BadRows
) -> list[Example]:
    """Returns the examples of the rows that can be used, each read by itself."""
    found: list[Example] = []
    for index in range(len(table.rows)):
        try:
            found.extend(reader.examples(table.alone(index), columns))
        except DataError as error:
            where = table.where(index)
            counted.add(where, str(error).removeprefix(where).lstrip(":, "))
    return found


def read_tables(settings: DataSettings, bad: BadSplits | None = None) -> dict[str, Table]:
    """Returns the tables of the splits that are given.

    Raises:
        DataError: One can't be read.
    """
    tables = dict(read_source(settings.train, bad))
    if "train" not in tables:
        raise DataError(f'"{settings.train}" holds no train split: found {", ".join(tables)}.')
    for split in ("validation", "test"):
        spec = getattr(settings, split)
        if spec is not None:
            tables[split] = read_split(spec, split, bad)
    return {split: tables[split] for split in SPLITS if split in tables}


def _hashes(settings: DataSettings) -> dict[str, str]:
    hashes: dict[str, str] = {}
    for spec in (settings.train, settings.validation, settings.test):
        hashes.update(file_hashes(spec) if spec is not None else {})
    return hashes


def _complete(
    splits: dict[str, list[Example]], settings: DataSettings, report: DataReport
) -> dict[str, list[Example]]:
    """Cuts the splits that are missing from the training data."""
    left = 1.0
    for split in ("test", "validation"):
        share = getattr(settings, f"{split}_fraction")
        if split in splits or share == 0:
            continue
        splits["train"], splits[split] = hold_out(
            splits["train"], share / left, f"{split} {settings.seed}"
        )
        left -= share
        report.sources[split] = f"{share:.0%} of {report.sources['train']}"
        report.notes.append(
            f"No {split} data given: {len(splits[split])} of the training rows were held out "
            f"(seed {settings.seed})."
        )
    for split, examples in splits.items():
        if not examples:
            raise DataError(
                f"The {split} split is empty: {report.sources[split]} leaves no row for it; "
                f"give more rows or set data.{split}_fraction."
            )
    return {split: splits[split] for split in SPLITS if split in splits}


def hold_out(
    examples: Sequence[Example], share: float, seed: str
) -> tuple[list[Example], list[Example]]:
    """Returns examples parted in two, the second holding `share` of each stratum.

    Examples with the same key stay together, and both parts keep the order. A stratum of two or
    more texts leaves at least one to each part.
    """
    strata: dict[str, dict[str, None]] = defaultdict(dict)
    first: dict[str, str] = {}
    for example in examples:
        stratum = first.setdefault(example.key, example.stratum)
        strata[stratum][example.key] = None
    held: set[str] = set()
    for stratum, keys in strata.items():
        count = min(max(round(len(keys) * share), 1), len(keys) - 1)
        held.update(random.Random(f"{seed} {stratum}").sample(sorted(keys), count))
    kept = [example for example in examples if example.key not in held]
    return kept, [example for example in examples if example.key in held]


def _count(splits: Mapping[str, Sequence[Example]], report: DataReport) -> None:
    keys = {split: [example.key for example in examples] for split, examples in splits.items()}
    for split, examples in splits.items():
        report.rows[split] = len(examples)
        labels = Counter(example.stratum for example in examples if example.stratum)
        report.labels[split] = dict(sorted(labels.items()))
        report.duplicates[split] = len(examples) - len(set(keys[split]))
    for split, other in (("validation", "train"), ("test", "train"), ("test", "validation")):
        if split in keys and other in keys:
            seen = set(keys[other])
            report.leaks[f"{split} in {other}"] = sum(key in seen for key in keys[split])
    report.contradictions = _contradictions(splits["train"])
    report.notes.extend(_oddities(report))


def _contradictions(examples: Iterable[Example]) -> int:
    first: dict[str, str] = {}
    other = {
        example.key
        for example in examples
        if first.setdefault(example.key, example.stratum) != example.stratum
    }
    return len(other)


def _oddities(report: DataReport) -> list[str]:
    notes = [
        f"{count} {split} rows repeat the text of an earlier one."
        for split, count in report.duplicates.items()
        if count
    ]
    for pair, count in report.leaks.items():
        split, _, other = pair.split()
        if count:
            notes.append(
                f"{count} of {report.rows[split]} {split} rows also occur in the {other} data, so "
                f"the {split} figures flatter the model."
            )
    if report.contradictions:
        notes.append(f"{report.contradictions} training texts occur with different labels.")
    return notes


def normalised(text: str) -> str:
    r"""Returns a text without the differences that don't make it another one.

    Example:
        >>> normalised("  Where is\nMy parcel? ")
        'where is my parcel?'
    """
    return " ".join(text.casefold().split())
