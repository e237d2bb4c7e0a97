"""Token labelling: rows, tokens, answers, and whole runs on tiny models."""

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
from graftune.tasks.labelling import Labelling
from graftune.tasks.models import load_base
from graftune.tasks.result import RunResult
from graftune.tasks.settings import Columns, RunSettings
from graftune.tasks.tables import Table
from graftune.tasks.task import Ready
from tests.tasks import tiny

TASK = Labelling()
LABELS = ["O", "B-sum", "I-sum", "B-thing", "I-thing"]


def examples(rows: list[dict[str, Any]], **named: str) -> list[Example]:
    table = Table(rows, "a.jsonl", list(range(1, len(rows) + 1)))
    return TASK.examples(table, TASK.columns(table, Columns(**named)))


def made_ready(folder: Path, make: Any, max_length: int = 16) -> Ready:
    base = load_base(str(make(folder)), "token-classification", labels=LABELS)
    return Ready(base.model, base.tokenizer, LABELS, max_length)


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Ready:
    return made_ready(tmp_path_factory.mktemp("bert"), tiny.bert)


@pytest.fixture(scope="module")
def bytewise(tmp_path_factory: pytest.TempPathFactory) -> Ready:
    return made_ready(tmp_path_factory.mktemp("gpt2"), tiny.gpt2, 15)


@pytest.mark.parametrize(
    ("words", "tags"),
    [("tokens", "ner_tags"), ("words", "tags"), ("Words", "labels"), ("token", "label")],
)
def test_usual_columns_are_found(words: str, tags: str) -> None:
    (one,) = examples([{"id": 1, words: ["a", "b"], tags: ["B-x", "O"]}])
    assert one.fields == {"words": ["a", "b"], "tags": ["B-x", "O"], "begun": 0}


def test_named_columns_win() -> None:
    row = {"tokens": ["a"], "raw": ["b"], "tags": ["O"], "fine": ["B-x"]}
    (one,) = examples([row], words="raw", tags="fine")
    assert (one.fields["words"], one.fields["tags"]) == (["b"], ["B-x"])


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"words": ["a", "b"], "tags": ["O"]}, "a.jsonl:1: there are 2 words and 1 tags."),
        ({"words": [], "tags": []}, 'a.jsonl:1: there are no words ("words" is empty).'),
        ({"words": "a b", "tags": ["O"]}, "is 'a b', expected a list of words."),
        ({"words": ["a"], "tags": "O"}, "is 'O', expected a list of tags."),
        ({"words": ["a", " "], "tags": ["O", "O"]}, "a.jsonl:1: word 2 is ' ', expected a text."),
        ({"words": ["a"], "tags": [3]}, 'word 1, "a", is 3 (a number says nothing without'),
        ({"words": ["a"], "tags": ["S-x"]}, 'a.jsonl:1: word 1, "a": the tag is "S-x", expected O'),
    ],
)
def test_a_row_that_can_not_be_used_is_refused_with_its_place(
    row: dict[str, Any], said: str
) -> None:
    with pytest.raises(DataError) as caught:
        examples([row])
    assert said in str(caught.value)


def test_entities_without_a_beginning_are_mended_counted_and_said() -> None:
    rows = [
        {"words": ["a", "b"], "tags": ["B-x", "I-x"]},
        {"words": ["c", "d", "e"], "tags": ["O", "I-x", "I-y"]},
    ]
    found = examples(rows)
    assert found[1].fields["tags"] == ["O", "B-x", "B-y"]
    assert TASK.remarks(found) == [
        "2 of 3 entities begin with I- and not with B- (the first in a.jsonl:2): they were read as "
        "beginning there, as in IOB1."
    ]
    assert TASK.remarks(found[:1]) == []


def test_labels_are_all_tags_of_the_types_in_training() -> None:
    assert TASK.labels({"train": examples(tiny.tagged(3))}) == LABELS


def test_an_unknown_type_is_refused_with_place_and_neighbour() -> None:
    train = examples(tiny.tagged(3))
    test = examples([{"words": ["a", "b"], "tags": ["O", "B-thign"]}])
    with pytest.raises(DataError) as caught:
        TASK.labels({"train": train, "test": test})
    assert str(caught.value) == (
        'a.jsonl:1: the tag "B-thign" (word 2) never occurs in the training data (test). '
        'Did you mean "thing"?'
    )
    with pytest.raises(DataError, match=r"is not one that the run was trained on"):
        TASK.check_known(test, LABELS)
    TASK.check_known(train, LABELS)


def test_training_without_an_entity_is_refused() -> None:
    with pytest.raises(DataError, match="All words of the 1 training rows have the tag O"):
        TASK.labels({"train": examples([{"words": ["a"], "tags": ["O"]}])})


def test_only_the_first_token_of_a_word_is_labelled(bytewise: Ready) -> None:
    row = {"words": ["i", "pay", "now"], "tags": ["O", "B-sum", "I-sum"]}
    encoded = TASK.encode(examples([row]), bytewise).features[0]
    tokens = bytewise.tokenizer.convert_ids_to_tokens(encoded["input_ids"])
    assert tokens == ["i", "Ġp", "a", "y", "Ġn", "o", "w"]
    assert encoded["labels"] == [0, 1, -100, -100, 2, -100, -100]


def test_special_tokens_are_not_labelled(ready: Ready) -> None:
    row = {"words": ["my", "parcel"], "tags": ["O", "B-thing"]}
    assert TASK.encode(examples([row]), ready).features[0]["labels"] == [-100, 0, 3, -100]


def test_cut_words_are_counted_said_and_count_as_outside(bytewise: Ready) -> None:
    row = {"words": ["money", "back", "please", "soon"], "tags": ["B-sum", "I-sum", "O", "B-thing"]}
    rows = examples([row, {"words": ["i"], "tags": ["O"]}])
    encoded = TASK.encode(rows, bytewise)
    assert (encoded.lengths, len(encoded.features[0]["input_ids"])) == ([19, 1], 15)
    assert encoded.notes == [
        "1 of 5 words, in 1 of 2 rows, lie behind the first 15 tokens (the longest row has 19): "
        "they were cut, teach nothing, and count as O."
    ]
    score = TASK.scorer(rows, encoded, bytewise)
    labels = torch.full((2, 15), -100)
    for at, one in enumerate(encoded.features):
        labels[at, : len(one["labels"])] = torch.tensor(one["labels"])
    found = score(labels.clamp(min=0).numpy(), None)  # every word that is left is right
    assert found["entity_precision"] == 1
    assert found["entity_recall"] == 0.5
    assert found["token_accuracy"] == 4 / 5
    said = TASK.answer(rows, bytewise, batch_size=2, max_new_tokens=1)
    assert [len(one["tags"]) for one in said] == [4, 1]
    assert said[0]["tags"][3] == "O"


def test_words_without_a_token_are_counted(ready: Ready) -> None:
    from tokenizers import normalizers

    rows = examples([{"words": ["my", "\u200b", "parcel"], "tags": ["O", "O", "B-thing"]}])
    inner = ready.tokenizer.backend_tokenizer
    inner.normalizer = normalizers.Replace("\u200b", "")
    try:
        encoded = TASK.encode(rows, ready)
        (said,) = TASK.answer(rows, ready, batch_size=1, max_new_tokens=1)
    finally:
        inner.normalizer = normalizers.Sequence([])
    assert encoded.features[0]["labels"] == [-100, 0, 3, -100]
    assert encoded.notes == [
        "Of 1 of 3 words the tokenizer makes no token: they teach nothing, and count as O."
    ]
    assert said["tags"][1] == "O"


def test_a_slow_tokenizer_is_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(DataError, match=r"Slow doesn't say where .* labelling needs"):
        TASK.prepare(Slow())


def test_answers_hold_words_tags_and_entities(ready: Ready) -> None:
    asked = [TASK.question("hello good day", "row 1"), TASK.question({"words": ["now"]}, "row 2")]
    said = TASK.answer(asked, ready, batch_size=2, max_new_tokens=1)
    assert [one["words"] for one in said] == [["hello", "good", "day"], ["now"]]
    for one in said:
        assert len(one["tags"]) == len(one["words"])
        for mark in one["entities"]:
            words = one["words"][mark["start"] : mark["end"]]
            assert mark["text"] == " ".join(words)
            assert one["tags"][mark["start"]] == f"B-{mark['type']}"
            assert 0 < mark["score"] <= 1


@pytest.mark.parametrize("name", ["ready", "bytewise"])
def test_answers_do_not_depend_on_the_batch(name: str, request: pytest.FixtureRequest) -> None:
    chosen = request.getfixturevalue(name)
    asked = [TASK.question({"words": row["tokens"]}, "row") for row in tiny.tagged(9)]
    together = TASK.answer(asked, chosen, batch_size=9, max_new_tokens=1)
    alone = TASK.answer(asked, chosen, batch_size=1, max_new_tokens=1)
    assert [one["tags"] for one in together] == [one["tags"] for one in alone]
    scores = [[m["score"] for one in said for m in one["entities"]] for said in (together, alone)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)


def settings(folder: Path, make: Any = tiny.bert, **values: Any) -> RunSettings:
    base, data = folder / make.__name__, folder / "tagged.jsonl"
    if not base.exists():
        make(base)
    tiny.write_jsonl(data, tiny.tagged(60))
    given = RunSettings(
        base=str(base), task="labelling", data=str(data), method="lora", out=str(folder / "run"),
        train={"epochs": 6, "lr": 2e-2, "batch_size": 8},
    )  # fmt: skip
    return given.replaced(**values)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunResult]:
    folder = tmp_path_factory.mktemp("labelling")
    return folder / "run", run.train(settings(folder))


def test_it_learns_and_says_how_well_by_type(finished: tuple[Path, RunResult]) -> None:
    result = finished[1]
    assert result.metrics["test"]["entity_f1"] > 0.9
    assert result.metrics["validation"].keys() == {"loss", *Labelling.metrics}
    assert [one["label"] for one in result.classes] == ["sum", "thing"]
    assert result.labels == LABELS


def test_a_fresh_process_predicts_the_same(finished: tuple[Path, RunResult]) -> None:
    lines = (finished[0] / "predictions.test.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    code = (
        "import json, sys; from graftune.tasks.run import predict; "
        "print(json.dumps(predict(sys.argv[1], json.load(sys.stdin), 16)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(finished[0] / "adapter")],
        input=json.dumps([{"tokens": row["words"]} for row in rows]),
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = json.loads(done.stdout)
    assert found == [{k: v for k, v in row.items() if k != "true"} for row in rows]
    assert all(len(row["true"]) == len(row["tags"]) for row in rows)


def test_evaluation_gives_the_runs_own_figures(
    finished: tuple[Path, RunResult], tmp_path: Path
) -> None:
    folder, result = finished
    found = run.evaluate(folder, batch_size=16)
    assert (found["metrics"], found["classes"]) == (result.metrics["test"], result.classes)
    validated = run.evaluate(folder, split="validation")["metrics"]
    in_training = {k: v for k, v in result.metrics["validation"].items() if k != "loss"}
    assert validated == in_training
    other = tmp_path / "other.conll"
    other.write_text("hello O\nparcel B-thing\n\nmoney B-nothing\n")
    with pytest.raises(DataError, match='has no column "tokens"'):
        run.evaluate(folder, str(other))


def test_a_conll_file_trains_evaluates_and_predicts(tmp_path: Path) -> None:
    data = tmp_path / "a.conll"
    lines = [
        "\n".join(f"{w} X {t}" for w, t in zip(row["tokens"], row["ner_tags"], strict=True))
        for row in tiny.tagged(40)
    ]
    data.write_text("\n\n".join(lines) + "\n")
    result = run.train(settings(tmp_path, data=str(data), train={"epochs": 1}))
    assert result.data["columns"] == {"words": "words", "tags": "tags"}
    assert run.evaluate(tmp_path / "run", str(data))["rows"] == 40


@pytest.mark.parametrize(
    ("make", "method"),
    [
        (tiny.bert, {"name": "PTuningV2", "length": 4}),
        (tiny.bert, {"name": "BitFit"}),
        (tiny.bert, {"name": "PromptTuning", "length": 3}),
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
    made = settings(tmp_path, make, method=method, train={"epochs": 1})
    result = run.train(made)
    assert result.metrics["validation"]["loss"] > 0
    rows = [json.loads(line) for line in (tmp_path / "run/predictions.test.jsonl").open()]
    found = run.predict(tmp_path / "run", [{"words": row["words"]} for row in rows], 16)
    assert found == [{k: v for k, v in row.items() if k != "true"} for row in rows]
    alone = run.predict(tmp_path / "run", [{"words": row["words"]} for row in rows], 1)
    assert [one["tags"] for one in alone] == [one["tags"] for one in found]


def test_the_head_is_saved_with_the_adapter(finished: tuple[Path, RunResult]) -> None:
    from safetensors import safe_open

    with safe_open(finished[0] / "adapter" / "adapter_model.safetensors", "pt") as tensors:
        heads = [name for name in tensors.keys() if "classifier" in name]  # noqa: SIM118
    assert len(heads) == 2


def test_the_base_alone_can_not_answer(finished: tuple[Path, RunResult]) -> None:
    with pytest.raises(DataError, match="its head is new"):
        run.predict(finished[0], ["hello"], base_only=True)
