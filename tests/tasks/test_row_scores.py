"""How well each row was answered: its mean is the metric where that is one, in the rows' order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graftune.tasks import run
from graftune.tasks.data import Example
from graftune.tasks.models import load_base
from graftune.tasks.predicting import measure_logits
from graftune.tasks.settings import RunSettings
from graftune.tasks.task import Ready, find_task
from graftune.tasks.workspace import SCORES
from tests.tasks import tiny


def example(**fields: Any) -> Example:
    return Example(fields, "", str(fields.get("label", "")), "row")


def test_picked_labels_are_right_or_wrong() -> None:
    rows = [example(label="a"), example(label="b"), example(label="a")]
    said = [{"label": "a"}, {"label": "a"}, {"label": "a"}]
    found = find_task("classification").measure(rows, said, ["a", "b"])
    assert found.rows == [1.0, 0.0, 1.0]
    assert found.metrics["accuracy"] == pytest.approx(np.mean(found.rows))


def test_a_sentence_has_the_f1_of_its_entities() -> None:
    tags = [["B-x", "O", "B-y"], ["O", "O"], ["O", "O"], ["B-x", "I-x"]]
    said = [["B-x", "O", "O"], ["O", "O"], ["B-x", "O"], ["B-x", "O"]]
    rows = [example(tags=one) for one in tags]
    answers = [{"tags": one} for one in said]
    found = find_task("labelling").measure(rows, answers, ["O", "B-x", "I-x", "B-y", "I-y"])
    assert found.rows == pytest.approx([2 / 3, 1, 0, 0])


def test_a_question_has_the_f1_of_its_best_right_answer() -> None:
    rows = [example(answers=["money back", "money"]), example(answers=[])]
    answers = [{"answer": "money"}, {"answer": "soon"}]
    found = find_task("spans").measure(rows, answers, [])
    assert found.rows == [1.0, 0.0]
    assert found.metrics["f1"] == pytest.approx(np.mean(found.rows))


def test_a_number_has_its_error_below_zero() -> None:
    rows = [example(value=1.0), example(value=3.0)]
    found = find_task("regression").measure(rows, [{"value": 1.5}, {"value": 0.0}], [])
    assert found.rows == [-0.5, -3.0]
    assert found.metrics["mae"] == pytest.approx(-np.mean(found.rows))


def test_a_set_of_labels_has_its_f1() -> None:
    rows = [example(labels=["a", "b"]), example(labels=[]), example(labels=["a"])]
    answers = [{"labels": ["a"]}, {"labels": []}, {"labels": ["b"]}]
    found = find_task("multilabel").measure(rows, answers, ["a", "b"])
    assert found.rows == pytest.approx([2 / 3, 1, 0])


def test_an_answers_tokens_are_counted_in_the_rows_order(tmp_path: Path) -> None:
    base = load_base(str(tiny.llama(tmp_path / "base")), "lm")
    task = find_task("instruct")
    task.prepare(base.tokenizer)
    ready = Ready(base.model, base.tokenizer, [], 64)
    turns = ["hello", "hello yes good day say what i can", "yes no", "good day you can"]
    rows = [
        Example({"messages": [{"role": "user", "content": one},
                              {"role": "assistant", "content": f"{one} money back"}]}, "", "", "")
        for one in turns
    ]  # fmt: skip
    features = task.encode(rows, ready).features
    together = measure_logits(task, ready, features, 2)
    alone = [measure_logits(task, ready, [one], 1) for one in features]
    assert together.rows == [one.metrics["token_accuracy"] for one in alone]


def long_llama(folder: Path) -> Path:
    return tiny.llama(folder, positions=256)


@pytest.mark.parametrize(
    ("task", "make", "rows", "method"),
    [
        ("labelling", tiny.bert, tiny.tagged(), "lora"),
        ("spans", tiny.bert, tiny.passages(), "lora"),
        ("instruct", long_llama, tiny.lessons(), "lora"),
        ("instruct", long_llama, tiny.lessons(), "in-context"),
        ("classification", long_llama, tiny.mail(), "in-context"),
    ],
)
def test_a_run_writes_a_score_for_each_test_row(
    tmp_path: Path, task: str, make: Any, rows: list[dict[str, Any]], method: str
) -> None:
    given = {
        "base": str(make(tmp_path / "base")),
        "task": task,
        "data": str(tiny.write_jsonl(tmp_path / "rows.jsonl", rows)),
        "method": {"name": method, **({"shots": 1} if method == "in-context" else {})},
        "train": {} if method == "in-context" else {"steps": 1},
        "out": str(tmp_path / "run"),
    }
    result = run.train(RunSettings(**given))
    scores = [json.loads(line)["score"] for line in (tmp_path / "run" / SCORES).open()]
    assert len(scores) == result.data["rows"]["test"]
    assert all(0 <= score <= 1 for score in scores)
