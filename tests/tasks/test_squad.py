import json
from pathlib import Path

import pytest

from graftune.tasks.squad import answer_scores, exact_match, word_f1
from graftune.tasks.tables import read_table


@pytest.mark.parametrize(
    ("said", "right", "exact", "f1"),
    [
        ("the Eiffel Tower.", "Eiffel tower", 1, 1),
        ("in Paris", "Paris, France", 0, 0.5),
        ("a", "the", 1, 1),
        ("", "", 1, 1),
        ("", "Paris", 0, 0),
        ("cat cat", "cat", 0, 2 / 3),
        ("U.S.A", "usa", 1, 1),
    ],
)
def test_answers_are_compared_without_case_articles_and_punctuation(
    said: str, right: str, exact: float, f1: float
) -> None:
    assert exact_match(said, right) == exact
    assert word_f1(said, right) == pytest.approx(f1)


def test_the_best_of_several_right_answers_counts_and_none_is_empty() -> None:
    assert answer_scores(["old town", "", "x"], [["town", "the old town"], [], []]) == {
        "exact_match": pytest.approx(2 / 3),
        "f1": pytest.approx(2 / 3),
    }


def test_nested_articles_become_a_row_for_each_question(tmp_path: Path) -> None:
    answers = [{"text": "b", "answer_start": 2}]
    asked = [{"id": "1", "question": "q", "answers": answers}, {"id": "2", "question": "r"}]
    nested = {"version": "1.1", "data": [{"title": "t", "paragraphs": [
        {"context": "a b", "qas": asked}, {"context": "c", "qas": []},
    ]}]}  # fmt: skip
    path = tmp_path / "squad.json"
    path.write_text(json.dumps(nested))
    assert read_table(path).rows == [
        {"id": "1", "question": "q", "answers": answers, "context": "a b"},
        {"id": "2", "question": "r", "context": "a b"},
    ]
    path.write_text(json.dumps([{"text": "a"}]))
    assert read_table(path).rows == [{"text": "a"}]
