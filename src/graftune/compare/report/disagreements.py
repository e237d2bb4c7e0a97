"""The test rows that methods answer differently, those that part them most first."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MOST_ROWS = 30
LONGEST_TEXT = 200


@dataclass(frozen=True)
class Disagreement:
    """One row: its text, the right label, and each answer with the methods that gave it."""

    text: str
    true: str
    answers: tuple[tuple[str, str, bool], ...]
    """(answer, the methods' names, whether it is right), the most frequent first."""
    wrong: int
    """How many methods are wrong."""


def disagreements(answers: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Disagreement]:
    """Returns the rows on which methods differ, at most `MOST_ROWS`.

    Args:
        answers: Each method's rows, with "label" and "true", all in the same order.
    """
    lengths = Counter(len(rows) for rows in answers.values() if rows)
    if not lengths:
        return []
    length = lengths.most_common(1)[0][0]
    known = {name: rows for name, rows in answers.items() if len(rows) == length}
    found: list[Disagreement] = []
    for index in range(length):
        given: dict[str, list[str]] = defaultdict(list)
        for name, rows in known.items():
            given[str(rows[index]["label"])].append(name)
        if len(given) > 1:
            found.append(_row(next(iter(known.values()))[index], given))
    half = len(known) / 2
    found.sort(key=lambda one: abs(one.wrong - half))
    return found[:MOST_ROWS]


def _row(row: Mapping[str, Any], given: Mapping[str, list[str]]) -> Disagreement:
    true = str(row["true"])
    order = sorted(given, key=lambda answer: (-len(given[answer]), answer))
    wrong = sum(len(names) for answer, names in given.items() if answer != true)
    answers = tuple((answer, ", ".join(given[answer]), answer == true) for answer in order)
    return Disagreement(_text(row), true, answers, wrong)


def _text(row: Mapping[str, Any]) -> str:
    text = " ⁄ ".join(str(row[key]) for key in ("text", "text_pair") if row.get(key))
    return text if len(text) <= LONGEST_TEXT else text[: LONGEST_TEXT - 1] + "…"
