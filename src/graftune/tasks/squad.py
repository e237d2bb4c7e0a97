"""SQuAD's files and SQuAD's measures.

    {"data": [{"paragraphs": [{"context": …, "qas": [{"question": …, "answers": [{"text": …,
    "answer_start": …}]}]}]}]}

Source: Rajpurkar et al. 2016, arXiv 1606.05250, and 2018, arXiv 1806.03822 (questions without an
answer); the measures are those of their evaluation script.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, cast

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def questions_in(articles: Sequence[Any]) -> list[dict[str, Any]] | None:
    """Returns a row for each question of nested articles; None where they aren't such.

    Rows hold the question's own keys, and `context`.
    """
    rows: list[dict[str, Any]] = []
    for article in articles:
        paragraphs = _get(article, "paragraphs")
        if not isinstance(paragraphs, list):
            return None
        for paragraph in cast(list[Any], paragraphs):
            questions, context = _get(paragraph, "qas"), _get(paragraph, "context")
            if not isinstance(questions, list) or not all(
                isinstance(one, dict) for one in cast(list[Any], questions)
            ):
                return None
            rows += [{**one, "context": context} for one in cast(list[dict[str, Any]], questions)]
    return rows


def _get(value: Any, key: str) -> Any:
    return cast(Mapping[str, Any], value).get(key) if isinstance(value, dict) else None


def normalised_answer(text: str) -> str:
    """Returns an answer without case, punctuation, articles and additional spaces.

    Example:
        >>> normalised_answer("The  Eiffel-Tower, in Paris.")
        'eiffeltower in paris'
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(said: str, right: str) -> float:
    """Returns 1 if two answers are the same, normalised, else 0."""
    return float(normalised_answer(said) == normalised_answer(right))


def word_f1(said: str, right: str) -> float:
    """Returns the F1 of the words that two answers share, normalised; of empty ones 1 or 0.

    Example:
        >>> round(word_f1("in the old town", "Old Town"), 2)
        0.8
    """
    found, wanted = normalised_answer(said).split(), normalised_answer(right).split()
    if not found or not wanted:
        return float(found == wanted)
    shared = sum((Counter(found) & Counter(wanted)).values())
    return 2 * shared / (len(found) + len(wanted))


def answer_scores(said: Sequence[str], right: Sequence[Sequence[str]]) -> dict[str, float]:
    """Returns the means of exact match and F1, each answer measured against its best right one.

    Where there are no right answers, "" is right.
    """
    pairs = [(one, list(wanted) or [""]) for one, wanted in zip(said, right, strict=True)]
    count = max(len(pairs), 1)
    return {
        "exact_match": sum(max(exact_match(one, w) for w in wanted) for one, wanted in pairs)
        / count,
        "f1": sum(row_scores(said, right)) / count,
    }


def row_scores(said: Sequence[str], right: Sequence[Sequence[str]]) -> list[float]:
    """Returns each answer's F1 against its best right one; without right ones "" is right."""
    return [
        max(word_f1(one, w) for w in list(wanted) or [""])
        for one, wanted in zip(said, right, strict=True)
    ]
