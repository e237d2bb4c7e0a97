"""Raw text: what next and hidden words are measured by, and whole runs on tiny models."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from graftune.errors import DataError
from graftune.tasks import run
from graftune.tasks.data import Example
from graftune.tasks.lm import LanguageModelling, LMOptions, MaskedLanguageModelling
from graftune.tasks.models import load_base
from graftune.tasks.predicting import measure_logits
from graftune.tasks.settings import Columns, RunSettings
from graftune.tasks.tables import Table, read_table
from graftune.tasks.task import Ready, Task
from tests.tasks import tiny

BASES = {"llama": tiny.llama, "gpt2": tiny.gpt2, "bert": tiny.masked_bert}
STORY = ("hello i want parcel", "please say yes now", "you can say good day", "money back soon")


def examples(texts: list[Any], task: Task | None = None) -> list[Example]:
    task = task or LanguageModelling()
    table = Table([{"text": text} for text in texts], "raw.jsonl", list(range(1, len(texts) + 1)))
    return task.examples(table, task.columns(table, Columns()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("raw")
    for name, make in BASES.items():
        make(found / name)
    (found / "raw.txt").write_text("\n\n".join(f"{STORY[i % 4]} {STORY[i % 3]}" for i in range(60)))
    return found


def ready_of(folder: Path, name: str, task: str, max_length: int = 16) -> Ready:
    found = load_base(str(folder / name), task)
    return Ready(found.model, found.tokenizer, [], max_length)


@pytest.mark.parametrize("blocks", [True, False])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_perplexity_and_bits_are_those_of_a_plain_loop(
    folder: Path, name: str, blocks: bool
) -> None:
    ready = ready_of(folder, name, "causal-lm", 64 if name == "gpt2" else 16)
    task = LanguageModelling(LMOptions(blocks=blocks))
    rows = examples(list(STORY), task)
    encoded = task.encode(rows, ready)
    found = measure_logits(task, ready, encoded.features, 3, task.scorer(rows, encoded, ready))
    loss, count = 0.0, 0
    with torch.no_grad():
        for row in encoded.features:
            ids = row["input_ids"]
            for at in range(1, len(ids)):
                said = ready.model(torch.tensor([ids[:at]])).logits[0, -1]
                loss -= float(said.log_softmax(-1)[ids[at]])
                count += 1
    assert found.metrics["perplexity"] == pytest.approx(math.exp(loss / count), rel=1e-4)
    tokens = sum(len(row["input_ids"]) for row in encoded.features)
    size = sum(len(text.encode()) for text in STORY)
    expected = loss / count / math.log(2) * tokens / size
    assert found.metrics["bits_per_byte"] == pytest.approx(expected, rel=1e-4)


def test_blocks_hold_every_token_once_and_each_text_ends(folder: Path) -> None:
    ready = ready_of(folder, "llama", "causal-lm", 8)
    encoded = LanguageModelling().encode(examples(list(STORY)), ready)
    rows = [row["input_ids"] for row in encoded.features]
    assert [len(row) for row in rows[:-1]] == [8] * (len(rows) - 1)
    ids = [token for row in rows for token in row]
    assert ids.count(ready.tokenizer.eos_token_id) == 4
    assert len(ids) == sum(encoded.lengths)
    assert "4 texts of" in encoded.notes[0]


def test_the_same_words_are_hidden_in_every_measurement(folder: Path) -> None:
    ready, task = ready_of(folder, "bert", "masked-lm"), MaskedLanguageModelling()
    rows = task.encode(examples(list(STORY), task), ready).features
    collate = task.collate(ready)
    first, again = collate(rows), collate(rows)
    assert torch.equal(first["input_ids"], again["input_ids"])
    ready.model.train()
    torch.manual_seed(0)
    drawn = {tuple(collate(rows)["labels"].flatten().tolist()) for _ in range(8)}
    assert len(drawn) > 4
    alone = [collate(rows[:1])["labels"] for _ in range(20)]
    assert all(bool((labels != -100).any()) for labels in alone)


@pytest.mark.parametrize(
    ("name", "task", "lr"),
    [("llama", "lm", 2e-2), ("gpt2", "lm", 1e-2), ("bert", "masked-lm", 1e-2)],
)
def test_a_run_learns_and_a_new_process_goes_on(
    folder: Path, name: str, task: str, lr: float
) -> None:
    settings = RunSettings(
        base=str(folder / name),
        task=task,
        data={"train": str(folder / "raw.txt"), "max_length": 32},
        method={"name": "lora", "r": 8, "targets": "all-linear", "train_head": True},
        train={"lr": lr, "steps": 60, "batch_size": 4, "eval_every": 20},
        out=str(folder / f"run-{name}"),
    )
    result = run.train(settings)
    first, *_, last = (row for row in result.history if "eval_loss" in row)
    assert last["eval_loss"] < first["eval_loss"]
    assert ("bits_per_byte" in result.metrics["test"]) == (task == "lm")
    assert run.evaluate(folder / f"run-{name}")["metrics"] == pytest.approx(result.metrics["test"])
    code = (
        "import json, sys; from graftune.tasks.predicting import Predictor;"
        "print(json.dumps(Predictor.load(sys.argv[1]).predict(json.loads(sys.argv[2]))))"
    )
    asked = ["hello [MASK] want parcel"] if task == "masked-lm" else ["hello i", "please say yes"]
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder / f"run-{name}"), json.dumps(asked)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    answers = json.loads(done.stdout.strip().splitlines()[-1])
    assert [one["text"] for one in answers] == asked
    assert all(one["answer"] and "[MASK]" not in one["answer"] for one in answers)


def test_a_text_file_has_a_text_in_each_paragraph(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\nOne.\nStill one.\n\n\nTwo.\n")
    table = read_table(tmp_path / "a.txt")
    assert [row["text"] for row in table.rows] == ["One.\nStill one.", "Two."]
    assert [table.where(n).rsplit(":", 1)[1] for n in (0, 1)] == ["2", "6"]


@pytest.mark.parametrize(
    ("text", "said"),
    [("  ", r'raw.jsonl:1: the text \("text"\) is empty'), (3, "is 3, expected a text")],
)
def test_rows_that_cannot_be_learnt_are_told(text: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        examples([text])


def test_a_tokenizer_that_cannot_is_refused(folder: Path) -> None:
    with pytest.raises(DataError, match="no mask token"):
        MaskedLanguageModelling().prepare(ready_of(folder, "llama", "causal-lm").tokenizer)
    with pytest.raises(DataError, match="no end token"):
        LanguageModelling().prepare(ready_of(folder, "bert", "masked-lm").tokenizer)
