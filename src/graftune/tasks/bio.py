"""Entities as tags of words, in the BIO scheme (IOB2), and how well they are found.

    Empire State Building is tall      B-place  I-place  I-place  O  O       entity: place, 0 to 3

Every entity begins with B-; O is outside of all. Where I- follows neither B- nor I- of its type, as
in the older scheme IOB1, an entity begins there, as the shared tasks' `conlleval` reads it too.

Source: Tjong Kim Sang and De Meulder 2003, arXiv cs/0306050 (an entity is right if its type and
both its ends are); the counting is nervaluate's, its "strict".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from graftune.errors import DataError

OUTSIDE = "O"
SCHEME = (
    "O, B-TYPE or I-TYPE (BIO; of IOBES write S- as B- and E- as I-, of BILOU U- as B- and L- as "
    "I-)"
)


@dataclass(frozen=True)
class Entity:
    """The words from `start` to before `end`, counted from 0."""

    type: str
    start: int
    end: int


def type_of(tag: str) -> str:
    """Returns a tag's type, '' of O.

    Raises:
        DataError: It is no tag of the scheme.
    """
    if tag == OUTSIDE:
        return ""
    if tag[:2] not in ("B-", "I-") or len(tag) < 3:
        raise DataError(f'the tag is "{tag}", expected {SCHEME}')
    return tag[2:]


def tag_names(types: Sequence[str]) -> list[str]:
    """Returns all tags of some types, by number: O, then B- and I- of each."""
    return [OUTSIDE, *(f"{place}-{name}" for name in types for place in "BI")]


def consistent(tags: Sequence[str]) -> tuple[list[str], int]:
    """Returns tags in which every entity begins with B-, and how many began with I-.

    Example:
        >>> consistent(["I-per", "I-per", "O", "B-per", "I-place"])
        (['B-per', 'I-per', 'O', 'B-per', 'B-place'], 2)
    """
    made: list[str] = []
    for tag, before in zip(tags, [OUTSIDE, *tags], strict=False):
        begins = tag[0] == "I" and type_of(before) != type_of(tag)
        made.append(f"B{tag[1:]}" if begins else tag)
    return made, sum(one != tag for one, tag in zip(made, tags, strict=True))


def entities(tags: Sequence[str]) -> list[Entity]:
    """Returns the entities that tags mark, in their order.

    Example:
        >>> entities(["B-per", "I-per", "O", "I-place"])
        [Entity(type='per', start=0, end=2), Entity(type='place', start=3, end=4)]
    """
    marks = [*consistent(tags)[0], OUTSIDE]
    found: list[Entity] = []
    start: int | None = None
    for at, tag in enumerate(marks):
        if start is not None and tag[0] != "I":
            found.append(Entity(type_of(marks[start]), start, at))
            start = None
        if tag[0] == "B":
            start = at
    return found


def entity_scores(
    said: Sequence[Sequence[str]], true: Sequence[Sequence[str]]
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Returns `{precision, recall, f1}` of whole entities, and the same and `support` by `label`.

    A score whose denominator is 0 is 0.
    """
    from nervaluate.evaluator import Evaluator

    found, right = _as_dictionaries(said), _as_dictionaries(true)
    types = sorted({one["label"] for row in (*found, *right) for one in row})
    if not types:
        return dict.fromkeys(("precision", "recall", "f1"), 0.0), []
    result = Evaluator(right, found, tags=types, loader="dict").evaluate()
    by_type = [{"label": name, **_scores(result["entities"][name])} for name in types]
    overall = _scores(result["overall"])
    return {key: overall[key] for key in ("precision", "recall", "f1")}, by_type


def row_f1(said: Sequence[str], true: Sequence[str]) -> float:
    """Returns F1 of one row's whole entities; 1 where there are none and none were found.

    Example:
        >>> row_f1(["B-a", "O"], ["B-a", "B-b"]), row_f1(["O", "O"], ["O", "O"])
        (0.6666666666666666, 1.0)
    """
    found, right = set(entities(said)), set(entities(true))
    if not found and not right:
        return 1.0
    return 2 * len(found & right) / (len(found) + len(right))


def _scores(result: Any) -> dict[str, float]:
    strict = result["strict"]
    return {
        "precision": float(strict.precision),
        "recall": float(strict.recall),
        "f1": float(strict.f1),
        "support": int(strict.possible),
    }


def _as_dictionaries(rows: Sequence[Sequence[str]]) -> list[list[dict[str, Any]]]:
    return [
        [{"label": one.type, "start": one.start, "end": one.end - 1} for one in entities(row)]
        for row in rows
    ]
