"""The help-desk's messages are enough, balanced, varied and different from each other."""

import json
import re
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest

from graftune.examples.helpdesk import LABELS, TEST, TRAIN, VALIDATION

Row = dict[str, str]
NEAR = 0.5
"""Shared among all the 4-letter pieces of two texts; above it they say nearly the same."""
SHARES = {TRAIN: 0.7, VALIDATION: 0.1, TEST: 0.2}


def rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def plain(text: str) -> str:
    return re.sub(r"\W+", " ", text.lower()).strip()


def pieces(text: str) -> frozenset[str]:
    return frozenset(text[start : start + 4] for start in range(max(1, len(text) - 3)))


EVERY = [row for path in SHARES for row in rows(path)]


def test_there_are_enough_messages_over_fifteen_intents():
    assert len(EVERY) >= 1_300
    assert {row["label"] for row in EVERY} == set(LABELS)
    assert len(LABELS) == 15
    assert list(LABELS) == sorted(LABELS)


def test_each_row_has_two_clean_columns():
    for row in EVERY:
        text = row["text"]
        assert list(row) == ["text", "label"]
        assert text == " ".join(text.split()) != ""
        assert text.isprintable()
        assert "\N{REPLACEMENT CHARACTER}" not in text


@pytest.mark.parametrize("path", SHARES, ids=lambda path: path.stem)
def test_each_split_holds_its_share_of_each_intent(path: Path):
    whole = Counter(row["label"] for row in EVERY)
    split = Counter(row["label"] for row in rows(path))
    for label in LABELS:
        assert abs(split[label] - SHARES[path] * whole[label]) <= 1.5, label


def test_intents_are_balanced():
    counts = Counter(row["label"] for row in EVERY).values()
    assert min(counts) >= 85
    assert max(counts) <= 1.1 * min(counts)


def test_messages_vary_in_length():
    words = sorted(len(row["text"].split()) for row in EVERY)
    low, middle, high, top = (words[int(len(words) * share)] for share in (0.05, 0.5, 0.95, 0.985))
    assert low <= 4
    assert 10 <= middle <= 16
    assert high >= 22
    assert top >= 40


def test_messages_vary_in_manner():
    texts = [row["text"] for row in EVERY]
    assert sum(text == text.lower() for text in texts) >= 100
    assert sum(text == text.upper() for text in texts) >= 10
    assert 0.3 < sum("?" in text for text in texts) / len(texts) < 0.7
    openings = Counter(" ".join(plain(text).split()[:3]) for text in texts)
    assert max(openings.values()) <= 0.02 * len(texts)


def test_no_two_messages_say_nearly_the_same():
    texts = [plain(row["text"]) for row in EVERY]
    assert len({text.replace(" ", "") for text in texts}) == len(texts)
    for one, other in combinations([pieces(text) for text in texts], 2):
        # The smaller set's size bounds what two can share, so most pairs need no comparing.
        if min(len(one), len(other)) <= NEAR * max(len(one), len(other)):
            continue
        shared = len(one & other)
        assert shared < NEAR * (len(one) + len(other) - shared), (sorted(one), sorted(other))


def test_the_card_defines_each_intent_and_counts_its_messages():
    card = TRAIN.with_name("README.md").read_text(encoding="utf-8")
    counts = Counter(row["label"] for row in EVERY)
    for label in LABELS:
        assert re.search(rf"^\| `{label}` \|.+\| {counts[label]} \|$", card, re.MULTILINE), label
    for path in SHARES:
        assert f"| `{path.name}` | {len(rows(path))} |" in card
