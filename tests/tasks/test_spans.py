"""Extractive question answering: rows, windows, answers, and whole runs on tiny models."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from graftune.errors import DataError
from graftune.tasks import run
from graftune.tasks.data import Example
from graftune.tasks.models import load_base
from graftune.tasks.result import RunResult
from graftune.tasks.settings import Columns, RunSettings
from graftune.tasks.spans import SpanOptions, Spans
from graftune.tasks.tables import Table
from graftune.tasks.task import Ready
from tests.tasks import tiny

TASK = Spans(SpanOptions(stride=2, longest=3))
OPEN = Spans(SpanOptions(no_answer=True))
CONTEXT = "my parcel is not my money"


def examples(rows: list[dict[str, Any]], task: Spans = TASK, **named: str) -> list[Example]:
    table = Table(rows, "a.jsonl", list(range(1, len(rows) + 1)))
    return task.examples(table, task.columns(table, Columns(**named)))


def row(answers: Any, context: str = CONTEXT, **more: Any) -> dict[str, Any]:
    return {"question": "what", "context": context, "answers": answers, **more}


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Ready:
    base = load_base(str(tiny.bert(tmp_path_factory.mktemp("bert"))), "question-answering")
    return Ready(base.model, base.tokenizer, [], 12)


@pytest.mark.parametrize(
    "answers",
    [
        [{"text": "parcel", "answer_start": 3}],
        {"text": ["parcel"], "answer_start": [3]},
        {"text": ["parcel"]},
        {"text": "parcel", "answer_start": 3},
        ["parcel"],
        "parcel",
    ],
)
def test_answers_are_read_in_all_usual_forms(answers: Any) -> None:
    (one,) = examples([row(answers)])
    assert (one.fields["answers"], one.fields["start"]) == (["parcel"], 3)


def test_usual_and_named_columns_are_found() -> None:
    (one,) = examples([{"query": "q", "passage": "a b", "answer": "b"}])
    assert one.fields == {"question": "q", "context": "a b", "answers": ["b"], "start": 2}
    given = {"question": "q", "x": "a b", "y": "a", "answers": "b", "context": "c"}
    assert examples([given], context="x", answer="y")[0].fields["answers"] == ["a"]


def test_a_place_settles_which_occurrence_is_meant() -> None:
    (one,) = examples([row([{"text": "my", "answer_start": 17}])])
    assert one.fields["start"] == 17
    assert examples([row("my")])[0].fields["start"] == 0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            row([{"text": "money", "answer_start": 3}]),
            'a.jsonl:1: the answer "money" isn\'t at answer_start 3, where the passage has "parce"'
            ", but at 20 (characters from 0)",
        ),
        (row([{"text": "my", "answer_start": -1}]), "answer_start is -1, expected a number"),
        (row({"text": ["a", "b"], "answer_start": [1]}), "2 answers and 1 answer_start"),
        (row([3]), "a.jsonl:1: an answer is 3, expected a text."),
        (row("my", context=" "), "the context (\"context\") is ' ', no text."),
        (row([]), "set task_options.no_answer: true"),
    ],
)
def test_a_row_that_can_not_be_used_is_refused_with_its_place(
    given: dict[str, Any], said: str
) -> None:
    with pytest.raises(DataError) as caught:
        examples([given])
    assert said in str(caught.value)


@pytest.mark.parametrize("given", [row([]), row({"text": [], "answer_start": []}), row(None)])
def test_no_answer_is_one_where_that_may_be(given: dict[str, Any], ready: Ready) -> None:
    (one,) = examples([given], OPEN)
    assert (one.fields["answers"], one.fields["start"]) == ([], None)
    assert OPEN.encode([one], ready).features[0]["labels"] == [0, 0]
    assert examples([row(["my"], is_impossible=True)], OPEN)[0].fields["answers"] == []


def test_passages_without_their_answer_are_said_and_teach_nothing(ready: Ready) -> None:
    found = examples([row("parcel"), row([{"text": "delivery", "answer_start": 5}])])
    assert TASK.remarks(found) == [
        "1 of 2 passages don't hold their answer (the first is a.jsonl:2): nothing is learnt from "
        "them."
    ]
    encoded = TASK.encode(found, ready)
    assert [one["labels"] for one in encoded.features] == [[4, 4]]
    assert len(encoded.lengths) == 2
    with pytest.raises(DataError, match="None of the 1 training passages holds its answer"):
        TASK.labels({"train": found[1:]})


def test_long_passages_are_windows_and_said(ready: Ready) -> None:
    long = "is it now soon can you say my parcel please"
    encoded = TASK.encode(examples([row("parcel", long), row("parcel")]), ready)
    assert len(encoded.features) == 3
    assert sum(one["labels"] != [0, 0] for one in encoded.features) == 2
    assert encoded.notes == [
        "1 of 2 passages and their questions have more than 12 tokens and are read in windows, 3 "
        "in all."
    ]
    assert encoded.cut == 0


def test_the_loss_is_that_of_the_model_and_does_not_see_padding(ready: Ready) -> None:
    rows = TASK.encode(examples([row("parcel"), row("my", "my money")]), ready).features
    collate = TASK.collate(ready)
    with torch.no_grad():
        alone = [TASK.forward(ready.model, collate([one]))["loss"] for one in rows]
        own = [ready.model(**TASK.inputs(collate([one]))).loss for one in rows]
        both = TASK.forward(ready.model, collate(rows))["loss"]
    assert torch.allclose(torch.stack(alone), torch.stack(own), atol=1e-6)
    assert torch.allclose(both, torch.stack(alone).mean(), atol=1e-6)


def test_answers_lie_where_they_say_and_do_not_depend_on_the_batch(ready: Ready) -> None:
    rows = [*tiny.passages(6), {"question": "what", "context": "is it now soon can you say my day"}]
    asked = [TASK.question(one, "row") for one in rows]
    together = TASK.answer(asked, ready, batch_size=8, max_new_tokens=1)
    alone = TASK.answer(asked, ready, batch_size=1, max_new_tokens=1)
    for one, other, given in zip(together, alone, rows, strict=True):
        assert one["answer"] == given["context"][one["start"] : one["end"]] == other["answer"]
        assert one["score"] == pytest.approx(other["score"], abs=1e-6)
        assert len(one["answer"].split()) <= 3
        assert one["best"][0] == {key: one[key] for key in ("answer", "start", "end", "score")}
        assert sum(found["score"] for found in one["best"]) == pytest.approx(1)


def test_a_text_alone_is_no_question() -> None:
    with pytest.raises(DataError, match='row 1 is a text alone: give rows with "question"'):
        TASK.question("what is it?", "row 1")


def settings(folder: Path, make: Any = tiny.bert, **values: Any) -> RunSettings:
    base, data = folder / make.__name__, folder / "passages.jsonl"
    if not base.exists():
        make(base)
    tiny.write_jsonl(data, tiny.passages(60))
    given = RunSettings(
        base=str(base), task="spans", data={"train": str(data), "max_length": 12}, method="lora",
        out=str(folder / "run"), task_options={"stride": 2, "longest": 4},
        train={"epochs": 8, "lr": 2e-2, "batch_size": 8},
    )  # fmt: skip
    return given.replaced(**values)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunResult]:
    folder = tmp_path_factory.mktemp("spans")
    return folder / "run", run.train(settings(folder))


def test_it_learns_and_is_measured_alike_in_training_and_after(
    finished: tuple[Path, RunResult],
) -> None:
    folder, result = finished
    assert result.metrics["test"]["f1"] > 0.9
    assert run.evaluate(folder, batch_size=16)["metrics"] == result.metrics["test"]
    validated = run.evaluate(folder, split="validation")["metrics"]
    in_training = {k: v for k, v in result.metrics["validation"].items() if k != "loss"}
    assert validated == pytest.approx(in_training)
    assert result.data["cut"]["train"] == 0


def test_a_fresh_process_predicts_the_same(finished: tuple[Path, RunResult]) -> None:
    rows = [json.loads(line) for line in (finished[0] / "predictions.test.jsonl").open()]
    assert all(one["true"] == ["money back"] for one in rows)
    code = (
        "import json, sys; from graftune.tasks.run import predict; "
        "print(json.dumps(predict(sys.argv[1], json.load(sys.stdin), 16)))"
    )
    asked = tiny.passages(60)
    known = run.predict(finished[0], asked, 16)
    done = subprocess.run(
        [sys.executable, "-c", code, str(finished[0] / "adapter")],
        input=json.dumps(asked), capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert json.loads(done.stdout) == known
    assert {one["answer"] for one in rows} <= {one["answer"] for one in known}


def test_unanswerable_questions_are_learnt(tmp_path: Path) -> None:
    rows = tiny.passages(60)
    for one in rows[::2]:
        one["context"] = one["context"].replace("money back", "good day")
        one["answers"] = []
    data = tiny.write_jsonl(tmp_path / "open.jsonl", rows)
    options = {"no_answer": True, "longest": 4}
    made = settings(tmp_path, data={"train": str(data)}, task_options=options, train={"epochs": 12})
    result = run.train(made)
    assert result.metrics["test"]["exact_match"] > 0.8
    found = run.predict(tmp_path / "run", rows[:20])
    assert {one["answer"] for one in found[::2]} == {""}
    assert found[0]["start"] is None


@pytest.mark.parametrize(
    ("make", "method"),
    [
        (tiny.bert, {"name": "PTuningV2", "length": 4}),
        (tiny.bert, {"name": "BitFit"}),
        (tiny.bert, {"name": "PromptTuning", "length": 3}),
        (tiny.bert, {"name": "FishMask"}),
        (tiny.bert, {"name": "full"}),
        (tiny.gpt2, {"name": "lora"}),
        (tiny.gpt2, {"name": "PTuningV2", "length": 4}),
        (tiny.llama, {"name": "lora"}),
        (tiny.llama, {"name": "PTuningV2", "length": 4}),
        (tiny.t5, {"name": "lora"}),
    ],
)
def test_methods_and_families_train_and_come_back(
    tmp_path: Path, make: Any, method: dict[str, Any]
) -> None:
    made = settings(tmp_path, make, method=method, train={"epochs": 1}, data={"max_length": 40})
    result = run.train(made)
    assert result.metrics["validation"]["loss"] > 0
    with safe_open(tmp_path / "run/adapter/adapter_model.safetensors", "pt") as tensors:
        heads = [name for name in tensors.keys() if "qa_outputs" in name]  # noqa: SIM118
    assert len(heads) == 2
    asked = tiny.passages(9)
    found = run.predict(tmp_path / "run", asked, 16)
    alone = run.predict(tmp_path / "run", asked, 1)
    assert [one["answer"] for one in found] == [one["answer"] for one in alone]
    assert [one["score"] for one in found] == pytest.approx([one["score"] for one in alone], 1e-4)


def test_the_base_alone_can_not_answer(finished: tuple[Path, RunResult]) -> None:
    with pytest.raises(DataError, match="its head is new"):
        run.predict(finished[0], tiny.passages(1), base_only=True)
