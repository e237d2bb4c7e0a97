"""Texts for texts: what is learnt and measured, and whole runs on a tiny T5 and a tiny BART."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from graftune.errors import DataError, FormatError, SettingsError
from graftune.tasks import run, seq2seq
from graftune.tasks.data import Example
from graftune.tasks.models import load_base
from graftune.tasks.seq2seq import Seq2Seq, Seq2SeqOptions, written
from graftune.tasks.settings import Columns, RunSettings
from graftune.tasks.tables import Table
from graftune.tasks.task import Ready
from tests.tasks import tiny

TASK = Seq2Seq()


def echoes(count: int = 60) -> list[dict[str, str]]:
    """Texts whose answer is one of two, by their last word."""
    said = {"delivery": "soon now", "refund": "money back yes"}
    return [{"document": row["text"], "summary": said[row["label"]]} for row in tiny.mail(count)]


def examples(rows: list[dict[str, Any]]) -> list[Example]:
    table = Table(rows, "texts.jsonl", list(range(1, len(rows) + 1)))
    return TASK.examples(table, TASK.columns(table, Columns()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("texts")
    tiny.t5(found / "t5")
    tiny.bart(found / "bart")
    tiny.llama(found / "llama")
    tiny.write_jsonl(found / "texts.jsonl", echoes())
    return found


def ready_of(folder: Path, name: str, max_length: int = 32) -> Ready:
    found = load_base(str(folder / name), "seq2seq-lm")
    return Ready(found.model, found.tokenizer, [], max_length)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_a_padded_batch_has_the_losses_of_each_text_alone(folder: Path, name: str) -> None:
    ready = ready_of(folder, name)
    rows = TASK.encode(examples(echoes(4)), ready).features
    collate = TASK.collate(ready)
    with torch.no_grad():
        batch = collate(rows)
        together = TASK.summarise(ready.model(**batch).logits, batch["labels"])
        for row, found in zip(rows, together, strict=True):
            alone = ready.model(**collate([row]))
            assert float(found[1]) == len(row["labels"])
            assert float(found[0] / found[1]) == pytest.approx(float(alone.loss), abs=1e-5)
    scores = TASK.score(together.numpy(), None)
    assert scores["perplexity"] == pytest.approx(
        float((together[:, 0].sum() / together[:, 1].sum()).exp()), rel=1e-5
    )


@pytest.mark.parametrize(("name", "lr"), [("t5", 2e-2), ("bart", 5e-3)])
def test_a_run_learns_and_a_new_process_writes(folder: Path, name: str, lr: float) -> None:
    settings = RunSettings(
        base=str(folder / name),
        task="seq2seq",
        data={"train": str(folder / "texts.jsonl")},
        method={"name": "lora", "r": 8, "targets": "all-linear", "train_head": True},
        train={"lr": lr, "steps": 200, "eval_every": 0},
        out=str(folder / f"run-{name}"),
    )
    result = run.train(settings)
    assert result.metrics["test"]["rouge_l"] > 0.9
    assert run.evaluate(folder / f"run-{name}")["metrics"] == result.metrics["test"]
    code = (
        "import json, sys; from graftune.tasks.predicting import Predictor;"
        "print(json.dumps(Predictor.load(sys.argv[1]).predict(json.loads(sys.argv[2]))))"
    )
    asked = ["hello i want parcel", {"document": "hello i want money"}]
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder / f"run-{name}"), json.dumps(asked)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    answers = json.loads(done.stdout.strip().splitlines()[-1])
    assert [one["answer"] for one in answers] == ["soon now", "money back yes"]


def test_long_texts_are_cut_on_both_sides_and_end(folder: Path) -> None:
    ready = ready_of(folder, "t5", 8)
    task = Seq2Seq(Seq2SeqOptions(max_target=4, prefix="say "))
    long = {"text": "parcel " * 20, "target": "yes " * 20}
    encoded = task.encode(examples([long, {"text": "yes", "target": "no"}]), ready)
    first, second = encoded.features
    assert (len(first["input_ids"]), len(first["labels"])) == (8, 4)
    assert first["labels"][-1] == second["labels"][-1] == ready.tokenizer.eos_token_id
    assert first["input_ids"][0] == second["input_ids"][0]
    assert encoded.lengths[0] > 20
    assert "1 of 2 targets are longer than 4 tokens" in encoded.notes[-1]


def test_scores_of_written_texts_are_those_by_hand() -> None:
    found = written(["the cat sat", "a dog"], ["the cat sat", "a big dog"])
    assert found["rouge1"] == pytest.approx((1 + 2 * 1 * (2 / 3) / (1 + 2 / 3)) / 2)
    assert found["rouge2"] == pytest.approx(0.5)
    assert found["rouge_l"] == pytest.approx(found["rouge1"])
    assert written(["so it is that"], ["so it is that"])["bleu"] == pytest.approx(1)
    assert 0 < found["chrf"] < 1


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "a", "summary": ""}, r'texts.jsonl:1: the answer \("summary"\) is empty'),
        ({"text": None, "summary": "b"}, "texts.jsonl:1: .text. is None, expected a text"),
        ({"text": "a"}, "has no answer column"),
    ],
)
def test_rows_that_cannot_be_learnt_are_told(row: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        examples([row])


def test_a_decoder_alone_is_refused(folder: Path) -> None:
    with pytest.raises((SettingsError, FormatError), match="instruct"):
        ready_of(folder, "llama")


def test_a_missing_library_is_told_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seq2seq, "_is_there", lambda name: name != "sacrebleu")
    with pytest.raises(SettingsError, match=r"need sacrebleu, .*graftune\[text\]"):
        TASK.labels({"train": [], "test": examples(echoes(1))})
