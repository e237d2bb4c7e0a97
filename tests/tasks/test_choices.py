"""Choosing among answers: which rows it takes, what it trains, and whole runs on tiny models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from graftune.errors import DataError, SettingsError
from graftune.tasks import run
from graftune.tasks.choices import ChoiceOptions, Choices
from graftune.tasks.data import Example
from graftune.tasks.models import load_base
from graftune.tasks.resolving import method_of, resolved
from graftune.tasks.settings import Columns, RunSettings
from graftune.tasks.tables import Table
from graftune.tasks.task import Ready, find_task
from tests.tasks import tiny

TASK = Choices()


def examples(rows: list[dict[str, Any]], **named: str) -> list[Example]:
    table = Table(rows, "quiz.jsonl", list(range(1, len(rows) + 1)))
    return TASK.examples(table, TASK.columns(table, Columns(**named)))


def quiz(count: int = 48) -> list[dict[str, Any]]:
    """Questions whose right answer is the choice that goes with their last word."""
    return [
        {
            "question": row["text"],
            "choices": ["refund", "delivery"] if i % 3 else ["delivery", "refund", "yes no"],
            "answer": row["label"],
        }
        for i, row in enumerate(tiny.mail(count))
    ]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("bases")
    return {"llama": str(tiny.llama(folder / "llama")), "t5": str(tiny.t5(folder / "t5"))}


def ready_of(base: str, labels: list[str] | None = None, max_length: int = 64) -> Ready:
    found = load_base(base, "lm")
    return Ready(found.model, found.tokenizer, labels or [], max_length)


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"question": "q", "choices": ["a", "b"], "answer": "b"}, "b"),
        ({"prompt": "q", "options": ["a", "b"], "label": 1}, "b"),
        ({"text": "q", "endings": '["a", "b"]', "label": "1"}, "b"),
        ({"text": "q", "choices": ["1", "0"], "label": 0}, "0"),
        ({"text": "q", "choices": [3, 4.0], "label": 4}, "4"),
    ],
)
def test_the_right_choice_is_named_or_numbered(row: dict[str, Any], answer: str) -> None:
    (found,) = examples([row])
    assert found.fields["answer"] == answer
    assert found.stratum == ""


def test_rows_with_labels_alone_choose_among_all_labels() -> None:
    found = examples(tiny.mail(6))
    assert found[0].fields == {"text": "hello i want parcel", "answer": "delivery"}
    assert TASK.labels({"train": found}) == ["delivery", "refund"]
    assert TASK.labels({"train": examples(quiz(4))}) == []


def test_pairs_are_read_together(bases: dict[str, str]) -> None:
    rows = [{"premise": "say yes", "hypothesis": "say no", "label": label} for label in "01"]
    found = examples(rows)
    ready = ready_of(bases["llama"], ["0", "1"])
    with_words = Choices(ChoiceOptions(words={"0": "no", "1": "yes"}))
    assert with_words.labels({"train": found}) == ["0", "1"]
    features = with_words.encode(found, ready).features
    text = ready.tokenizer.decode(features[0]["input_ids"])
    assert "say yes" in text.replace("\n", " ")
    assert "say no" in text
    assert [ready.tokenizer.decode(ids[0]) for ids in features[0]["choices"]] == ["no", "yes"]
    assert [row["labels"] for row in features] == [0, 1]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"text": "q", "choices": ["a", "b"], "label": "c"},
            r"quiz.jsonl:1: the label .c. is none",
        ),
        ({"text": "q", "choices": ["a", "b"], "label": 2}, "nor the number of one, from 0"),
        ({"text": "q", "choices": ["a"], "label": 0}, "expected a list of two or more different"),
        ({"text": "q", "choices": ["a", "a"], "label": 0}, "two or more different texts"),
        ({"text": "q", "choices": "a, b", "label": 0}, "expected a list"),
        ({"text": "q", "choices": ["a", "b"], "label": None}, "is missing"),
        ({"text": " ", "choices": ["a", "b"], "label": 0}, "is empty"),
        ({"text": "q", "choices": ["a", "b"]}, "has no label column"),
    ],
)
def test_rows_that_cannot_be_learnt_are_told(row: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        examples([row])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"loses": ["lm"]}, 'task_options: loses: unknown key. Did you mean "losses"'),
        ({"losses": ["unlikely"]}, r"task_options: losses.0: input should be"),
        ({"losses": []}, "task_options.losses is empty"),
    ],
)
def test_wrong_options_are_told(options: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        find_task("choices", options)


def test_a_task_without_options_says_so() -> None:
    with pytest.raises(SettingsError, match="the task instruct has none, found losses"):
        find_task("instruct", {"losses": ["lm"]})


def test_words_for_what_is_no_label_are_told() -> None:
    task = Choices(ChoiceOptions(words={"refnd": "money"}))
    with pytest.raises(SettingsError, match=r'"refnd" is no label.*Did you mean "refund"'):
        task.labels({"train": examples(tiny.mail(6))})


def test_options_are_filled_in_and_kept() -> None:
    settings = RunSettings(base="b", data="x", task="choices", task_options={"losses": ["lm"]})
    whole = resolved(
        settings, find_task("choices", settings.task_options), method_of({"name": "ia3"})
    )
    assert whole.task_options == {"losses": ["lm"], "words": {}}
    assert (whole.train.batch_size, whole.train.metric, whole.train.lr) == (8, "accuracy", 3e-3)


def test_a_long_text_loses_its_middle_and_no_choice(bases: dict[str, str]) -> None:
    rows = [{"text": "say " * 90 + "now", "choices": ["yes", "no good"], "label": 0}]
    for base in bases.values():
        encoded = TASK.encode(examples(rows), ready_of(base, max_length=32))
        (row,) = encoded.features
        whole = len(row["input_ids"]) + (
            max(map(len, row["choices"])) if base == bases["llama"] else 0
        )
        assert whole == 32
        assert encoded.notes[0].endswith("and were cut in the middle.")
    with pytest.raises(DataError, match="a text and its choice may have 3 in all"):
        TASK.encode(examples(rows), ready_of(bases["llama"], max_length=3))


def test_a_base_without_an_end_token_is_refused(bases: dict[str, str]) -> None:
    tokenizer = ready_of(bases["llama"]).tokenizer
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no end token"):
        TASK.prepare(tokenizer)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_methods_that_look_at_data_see_the_right_choices(kind: str, bases: dict[str, str]) -> None:
    ready = ready_of(bases[kind])
    rows = TASK.encode(examples(quiz(4)), ready).features
    batch = TASK.collate(ready)(rows)
    inputs = TASK.inputs(batch)
    assert len(inputs["input_ids"]) == 4
    model: Any = ready.model
    with torch.no_grad():
        assert torch.isfinite(model(**inputs).loss)
    said = [row["choices"][row["labels"]] for row in rows]
    assert [[t for t in row if t != -100] for row in inputs["labels"].tolist()] == said


@pytest.mark.parametrize(
    ("kind", "method", "train"),
    [("llama", "full", {"lr": 5e-3}), ("t5", "ia3", {"lr": 0.1, "optimizer": "adafactor"})],
)
def test_a_run_learns_to_choose(
    kind: str, method: str, train: dict[str, Any], bases: dict[str, str], tmp_path: Path
) -> None:
    data = tiny.write_jsonl(tmp_path / "quiz.jsonl", quiz())
    settings = RunSettings(
        base=bases[kind], data=str(data), task="choices", method=method, out=str(tmp_path / "run"),
        train={"steps": 60, "eval_every": 20, **train},
    )  # fmt: skip
    result = run.train(settings)
    assert result.metrics["validation"].keys() == {"loss", "accuracy"}
    assert result.metrics["test"]["accuracy"] > 0.8
    assert run.evaluate(tmp_path / "run")["metrics"] == result.metrics["test"]
    lines = (tmp_path / "run" / "predictions.test.jsonl").read_text().splitlines()
    assert {"text", "label", "score", "probabilities", "answer"} <= json.loads(lines[0]).keys()
    asked = [{"question": "hello i want money", "choices": ["delivery", "refund"]}]
    (found,) = run.predict(tmp_path / "run", asked)
    assert found["label"] == "refund"
    assert found["score"] == max(found["probabilities"].values())
    assert sum(found["probabilities"].values()) == pytest.approx(1)
    (base,) = run.predict(tmp_path / "run", asked, base_only=True)
    assert base["probabilities"] != found["probabilities"]
    with pytest.raises(DataError, match="row 1: give the choices"):
        run.predict(tmp_path / "run", ["hello i want money"])


def test_a_run_over_labels_is_measured_as_a_classifier(
    bases: dict[str, str], tmp_path: Path
) -> None:
    data = tiny.write_jsonl(tmp_path / "mail.jsonl", tiny.mail(48))
    settings = RunSettings(
        base=bases["llama"], data=str(data), task="choices", method="full",
        out=str(tmp_path / "run"), task_options={"words": {"refund": "money back"}},
        train={"steps": 40, "lr": 5e-3, "accumulation": 2, "batch_size": 4},
    )  # fmt: skip
    result = run.train(settings)
    assert result.labels == ["delivery", "refund"]
    assert sum(map(sum, result.confusion)) == result.data["rows"]["test"]
    assert result.metrics["test"]["accuracy"] > 0.8
    assert run.evaluate(tmp_path / "run")["metrics"] == result.metrics["test"]
    texts = ["hello i want money", "hello i want parcel"]
    assert [one["label"] for one in run.predict(tmp_path / "run", texts)] == ["refund", "delivery"]
    told = json.loads((tmp_path / "run" / "adapter" / "graftune_task.json").read_text())
    assert told["task_options"]["words"] == {"refund": "money back"}
    assert told["chat_template"]


def test_batched_answers_equal_single_ones(bases: dict[str, str]) -> None:
    for base in bases.values():
        ready = ready_of(base)
        asked = [TASK.question(row, "row") for row in quiz(5)]
        together = TASK.answer(asked, ready, batch_size=5, max_new_tokens=1)
        alone = TASK.answer(asked, ready, batch_size=1, max_new_tokens=1)
        for one, other in zip(together, alone, strict=True):
            assert one["label"] == other["label"]
            assert one["probabilities"] == pytest.approx(other["probabilities"], rel=1e-4)
