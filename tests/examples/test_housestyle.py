"""The house style's rows keep the style, differ from each other and are enough of them."""

import json
import re
from itertools import combinations
from pathlib import Path

import pytest

from graftune.examples.housestyle import (
    GREETING,
    SENTENCES,
    SIGN_OFF,
    TEST,
    TRAIN,
    is_house_style,
    sentences,
)

Row = dict[str, str]
NEAR = 0.5
"""Shared among all the 4-letter pieces of two texts; above it they say nearly the same."""


def rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def body(answer: str) -> str:
    return answer.removeprefix(GREETING).removesuffix(SIGN_OFF).strip()


def pieces(text: str) -> set[str]:
    plain = re.sub(r"\W+", " ", text.lower()).strip()
    return {plain[start : start + 4] for start in range(max(1, len(plain) - 3))}


EVERY = rows(TRAIN) + rows(TEST)


def test_there_are_enough_rows_in_each_split():
    assert len(rows(TRAIN)) >= 150
    assert len(rows(TEST)) >= 20


@pytest.mark.parametrize("row", EVERY, ids=lambda row: row["instruction"][:40])
def test_row_has_two_clean_columns_in_house_style(row: Row):
    assert list(row) == ["instruction", "answer"]
    assert all(text == text.strip() and "  " not in text for text in row.values())
    assert all(is_house_style(row["answer"]).values())
    assert row["answer"] == f"{GREETING} {body(row['answer'])}\n{SIGN_OFF}"
    assert sentences(body(row["answer"])) >= 2


@pytest.mark.parametrize("column", ["instruction", "answer"])
def test_no_two_rows_say_nearly_the_same(column: str):
    texts = [body(row[column]) for row in EVERY]
    assert len({re.sub(r"\W+", "", text.lower()) for text in texts}) == len(texts)
    for (one, first), (other, second) in combinations([(text, pieces(text)) for text in texts], 2):
        assert len(first & second) / len(first | second) < NEAR, (one, other)


def test_instructions_vary_in_length_and_manner():
    words = sorted(len(row["instruction"].split()) for row in EVERY)
    assert words[0] <= 3
    assert words[-1] >= 12
    asked = sum(row["instruction"].endswith("?") for row in EVERY)
    assert 0.5 < asked / len(EVERY) < 0.9
    openings = {row["instruction"].split()[0].lower() for row in EVERY}
    assert len(openings) >= 30


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (f"{GREETING} It is so. Sleep well.\n{SIGN_OFF}", (True, True, True)),
        (f"\n{GREETING} It is so. {SIGN_OFF} ", (True, True, True)),
        ("It is so.", (False, False, True)),
        (f"Well, {GREETING} It is so.\n{SIGN_OFF}", (False, True, True)),
        (f"{GREETING} It is so.\n{SIGN_OFF} And more.", (True, False, True)),
        (f"{GREETING} One. Two! Three? Four.\n{SIGN_OFF}", (True, True, False)),
        (f"{GREETING}\n{SIGN_OFF}", (True, True, False)),
        ("", (False, False, False)),
    ],
)
def test_check_tells_the_parts_apart(text: str, kept: tuple[bool, bool, bool]):
    assert tuple(is_house_style(text).values()) == kept


def test_sentences_are_counted_by_their_ends():
    assert sentences("It has 2.4 gigahertz. Yes!") == SENTENCES - 1
    assert sentences('Say: "Thank you." Then go') == 2
