"""Questions and long passages as overlapping windows of tokens, and the spans found in them.

    [CLS] question [SEP] passage, tokens 0 to 9 [SEP]
    [CLS] question [SEP] passage, tokens 6 to 15 [SEP]          stride 4: four tokens are shared

Token 0 stands for "no answer here". A span's score is its start's logit plus its end's; of all
windows, the best spans count, and for "no answer" the lowest score of token 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from graftune.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from graftune.tasks.data import Example
    from graftune.tasks.task import Ready

_LEAST_ROOM = 4
"""Tokens of a passage that a window must hold at least."""
NOWHERE = 0
"""The token that stands for no answer."""


@dataclass(frozen=True)
class Window:
    """One window of a row."""

    row: int
    """Which row it is of."""
    features: dict[str, Any]
    """`input_ids` and what the tokenizer gives besides."""
    places: list[tuple[int, int] | None]
    """Where each token lies in the passage, in characters; None of others."""

    def tokens_of(self, start: int, end: int) -> tuple[int, int]:
        """Returns the first and the last token of the passage's characters `start` to before `end`.

        Both are `NOWHERE` unless the window holds all of them.
        """
        inside = [(at, *place) for at, place in enumerate(self.places) if place is not None]
        held = [at for at, begins, ends in inside if ends > start and begins < end]
        whole = bool(held) and inside[0][1] <= start and inside[-1][2] >= end
        return (held[0], held[-1]) if whole else (NOWHERE, NOWHERE)


@dataclass(frozen=True)
class Span:
    """A part of a passage, in characters, and its score."""

    start: int
    end: int
    score: float


def windows_of(examples: Sequence[Example], ready: Ready, stride: int) -> list[Window]:
    """Returns the windows of all rows, in the rows' order.

    Args:
        examples: Rows with `question` and `context`.
        ready: The tokenizer and the windows' length.
        stride: Tokens of the passage that two windows share, at most half of what they hold of it.

    Raises:
        DataError: A question leaves no room for its passage.
    """
    between = _separator(ready.tokenizer)
    questions = [example.fields["question"].strip() + between for example in examples]
    groups: dict[int, list[int]] = {}
    for row, room in enumerate(_rooms(questions, examples, ready)):
        groups.setdefault(min(stride, room // 2), []).append(row)
    found: list[Window] = []
    for shared, rows in groups.items():
        texts = [(questions[row], examples[row].fields["context"]) for row in rows]
        found += [
            Window(rows[one.row], one.features, one.places)
            for one in _windows(texts, ready, shared)
        ]
    return sorted(found, key=lambda one: one.row)


def _windows(texts: Sequence[tuple[str, str]], ready: Ready, stride: int) -> Iterator[Window]:
    """Yields the windows of questions and passages, in their order."""
    tokenizer: Any = ready.tokenizer
    whole: Any = tokenizer(
        [question for question, _ in texts],
        [passage for _, passage in texts],
        truncation="only_second",
        max_length=ready.max_length,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    rows, offsets = whole.pop("overflow_to_sample_mapping"), whole.pop("offset_mapping")
    keys = [key for key in whole if key != "attention_mask"]
    for index, row in enumerate(rows):
        parts = whole.sequence_ids(index)
        places = [
            (int(place[0]), int(place[1])) if part == 1 and place[1] > place[0] else None
            for place, part in zip(offsets[index], parts, strict=True)
        ]
        yield Window(int(row), {key: whole[key][index] for key in keys}, places)


def _separator(tokenizer: Any) -> str:
    """Returns what parts question and passage where the tokenizer has no token for it."""
    parts = tokenizer("a", "b").sequence_ids(0)
    last = max((at for at, part in enumerate(parts) if part == 0), default=0)
    first = next((at for at, part in enumerate(parts) if part == 1), len(parts))
    return "\n" if first == last + 1 else ""


def _rooms(questions: Sequence[str], examples: Sequence[Example], ready: Ready) -> Iterator[int]:
    """Yields how many tokens of its passage a window of each row holds."""
    tokenizer: Any = ready.tokenizer
    most = ready.max_length - tokenizer.num_special_tokens_to_add(pair=True)
    ids = tokenizer(list(questions), add_special_tokens=False, verbose=False)["input_ids"]
    for question, example in zip(ids, examples, strict=True):
        if most - len(question) < _LEAST_ROOM:
            raise DataError(
                f"{example.where}: the question has {len(question)} tokens, which leaves no room "
                f"for its passage in {ready.max_length} (data.max_length)."
            )
        yield most - len(question)


def best_spans(window: Window, logits: NDArray[Any], longest: int, count: int) -> list[Span]:
    """Returns the best valid spans of a window: inside the passage, the start not behind the end.

    Args:
        window: The window.
        logits: Of its tokens `(tokens, 2)`, starts and ends; padding may follow.
        longest: Tokens of a span at most.
        count: Spans at most.
    """
    inside = [at for at, place in enumerate(window.places) if place is not None]
    starts, ends = np.asarray(logits, dtype=np.float64)[inside].T
    scores = starts[:, None] + ends[None, :]
    valid = np.triu(np.ones_like(scores, dtype=bool)) & ~np.triu(
        np.ones_like(scores, dtype=bool), longest
    )
    flat = np.where(valid, scores, -np.inf).ravel()
    best = np.argsort(-flat, kind="stable")[: min(count, int(valid.sum()))]
    found: list[Span] = []
    for at in best:
        first, last = divmod(int(at), len(inside))
        start, end = window.places[inside[first]], window.places[inside[last]]
        if start is not None and end is not None:
            found.append(Span(start[0], end[1], float(flat[at])))
    return found


def of_rows(
    windows: Sequence[Window], logits: Sequence[NDArray[Any]], rows: int, longest: int, count: int
) -> list[tuple[list[Span], float]]:
    """Returns each row's best spans over its windows, best first, and the score of no answer."""
    found: list[dict[tuple[int, int], Span]] = [{} for _ in range(rows)]
    nowhere = [np.inf] * rows
    for window, values in zip(windows, logits, strict=True):
        nowhere[window.row] = min(nowhere[window.row], float(values[NOWHERE].sum()))
        for span in best_spans(window, values, longest, count):
            place, known = (span.start, span.end), found[window.row]
            if place not in known or known[place].score < span.score:
                known[place] = span
    return [
        (sorted(spans.values(), key=lambda span: -span.score)[:count], score)
        for spans, score in zip(found, nowhere, strict=True)
    ]


def chances(scores: Sequence[float]) -> list[float]:
    """Returns the softmax of scores."""
    values = np.exp(np.asarray(scores) - max(scores))
    return (values / values.sum()).tolist()


def labelled(window: Window, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a window's features with its answer's first and last token as `labels`."""
    start = fields["start"]
    tokens = (
        (NOWHERE, NOWHERE)
        if start is None
        else window.tokens_of(start, start + len(fields["answers"][0]))
    )
    return {**window.features, "labels": list(tokens)}
