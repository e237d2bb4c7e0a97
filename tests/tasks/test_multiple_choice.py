"""Multiple choice by a head: what it computes, and whole runs on a tiny encoder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from graftune.errors import DataError
from graftune.tasks import run
from graftune.tasks.data import Example
from graftune.tasks.models import load_base
from graftune.tasks.multiple_choice import MultipleChoice
from graftune.tasks.settings import Columns, RunSettings
from graftune.tasks.tables import Table
from graftune.tasks.task import Ready, find_task
from tests.tasks import tiny
from tests.tasks.test_choices import quiz

TASK = MultipleChoice()


def examples(rows: list[dict[str, Any]]) -> list[Example]:
    table = Table(rows, "quiz.jsonl", list(range(1, len(rows) + 1)))
    return TASK.examples(table, TASK.columns(table, Columns()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("quiz")
    tiny.bert(found / "bert")
    tiny.write_jsonl(found / "quiz.jsonl", quiz(60))
    return found


def ready_of(folder: Path, max_length: int = 32) -> Ready:
    torch.manual_seed(0)
    found = load_base(str(folder / "bert"), "multiple-choice")
    return Ready(found.model, found.tokenizer, [], max_length)


def test_scores_are_those_of_each_choice_alone_and_the_loss_is_cross_entropy(folder: Path) -> None:
    ready, rows = ready_of(folder), examples(quiz(4))
    assert {len(row.fields["choices"]) for row in rows} == {2, 3}
    features = TASK.encode(rows, ready).features
    batch = TASK.collate(ready)(features)
    assert batch["input_ids"].shape[:2] == (4, 3)
    with torch.no_grad():
        found = TASK.forward(ready.model, dict(batch))
        losses: list[torch.Tensor] = []
        for row, feature, logits in zip(rows, features, found["logits"], strict=True):
            scores: list[torch.Tensor] = []
            for choice in row.fields["choices"]:
                pair = ready.tokenizer(row.fields["text"], choice, return_tensors="pt")
                tensors = {key: value[:, None] for key, value in pair.items()}
                scores.append(ready.model(**tensors).logits[0, 0])
            together = torch.stack(scores)
            torch.testing.assert_close(logits[: len(together)], together, atol=1e-5, rtol=1e-5)
            losses.append(-torch.log_softmax(together, 0)[feature["labels"]])
            assert bool((logits[len(together) :] < -1e30).all())
    torch.testing.assert_close(found["loss"], torch.stack(losses).mean(), atol=1e-5, rtol=1e-5)


def test_long_texts_are_cut_and_choices_are_not(folder: Path) -> None:
    row = {"text": "parcel " * 30, "choices": ["yes no", "money back"], "label": 0}
    encoded = TASK.encode(examples([row]), ready_of(folder, 16))
    ids = encoded.features[0]["choices"]
    assert [len(one) for one in ids] == [16, 16]
    tokenizer = ready_of(folder).tokenizer
    assert [tokenizer.decode(one[-3:-1]) for one in ids] == ["yes no", "money back"]
    assert encoded.lengths == [35]
    with pytest.raises(DataError, match=r"quiz.jsonl:1: a choice has .* tokens"):
        TASK.encode(examples([{**row, "choices": ["yes " * 20, "no"]}]), ready_of(folder, 16))


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"question": "q", "choices": ["a b", "c"], "answer": "B"}, "c"),
        (
            {"question": "q", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "label": "A"},
            "x",
        ),
        ({"question": "q", "choices": ["b", "a"], "answer": "a"}, "a"),
    ],
)
def test_the_right_choice_may_be_a_letter(row: dict[str, Any], answer: str) -> None:
    assert examples([row])[0].fields["answer"] == answer


def test_a_run_learns_and_a_new_process_answers(folder: Path) -> None:
    settings = RunSettings(
        base=str(folder / "bert"),
        task="multiple-choice",
        data={"train": str(folder / "quiz.jsonl")},
        method={"name": "lora", "r": 8, "targets": "all-linear"},
        train={"lr": 1e-2, "steps": 120, "eval_every": 0},
        out=str(folder / "run"),
    )
    result = run.train(settings)
    assert result.metrics["test"]["accuracy"] > 0.9
    assert run.evaluate(folder / "run")["metrics"] == result.metrics["test"]
    asked = {"text": "hello i want parcel", "choices": ["yes", "refund", "delivery"]}
    code = (
        "import json, sys; from graftune.tasks.predicting import Predictor;"
        "print(json.dumps(Predictor.load(sys.argv[1]).predict([json.loads(sys.argv[2])])))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder / "run"), json.dumps(asked)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    (answer,) = json.loads(done.stdout.strip().splitlines()[-1])
    assert answer["label"] == "delivery"
    assert sum(answer["probabilities"].values()) == pytest.approx(1)


def test_it_has_no_options_of_choices() -> None:
    with pytest.raises(Exception, match="multiple-choice has none"):
        find_task("multiple-choice", {"losses": ["lm"]})
