"""Sentence vectors: the loss and the ranks as plain loops have them, and runs on a tiny encoder."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from graftune.errors import DataError, SettingsError
from graftune.tasks import run
from graftune.tasks.data import Example
from graftune.tasks.embedding import Embedding, info_nce, ranks_of
from graftune.tasks.models import load_base
from graftune.tasks.predicting import Predictor
from graftune.tasks.settings import Columns, RunSettings
from graftune.tasks.tables import Table
from graftune.tasks.task import Ready, find_task
from tests.tasks import tiny

TASK = Embedding()
SIDES = ("parcel", "money", "hello", "yes", "day", "please")


def pairs(count: int = 60) -> list[dict[str, str]]:
    """Texts that belong together where they share one of six words."""
    fillers = ("good", "now", "soon", "can", "want", "say", "i", "you", "where", "back")
    return [
        {
            "query": f"{fillers[i // 6 % 10]} {SIDES[i % 6]}",
            "answer": f"{SIDES[i % 6]} {fillers[(i // 6 + 3) % 10]} {fillers[(i // 6 + 5) % 10]}",
        }
        for i in range(count)
    ]


def examples(rows: list[dict[str, Any]], **named: str) -> list[Example]:
    table = Table(rows, "pairs.jsonl", list(range(1, len(rows) + 1)))
    return TASK.examples(table, TASK.columns(table, Columns(**named)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("pairs")
    tiny.bert(found / "bert")
    tiny.write_jsonl(found / "pairs.jsonl", pairs(60))
    return found


def ready_of(folder: Path, max_length: int = 32) -> Ready:
    found = load_base(str(folder / "bert"), "feature")
    return Ready(found.model, found.tokenizer, [], max_length)


@pytest.mark.parametrize("negatives", [False, True])
def test_the_loss_is_that_of_a_plain_loop(negatives: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    vectors = torch.nn.functional.normalize(
        torch.randn(4, 3 if negatives else 2, 8, generator=draw), dim=-1
    )
    labels = torch.tensor(
        [[0, 1], [2, 3], [4, 1], [0, 5]]
    )  # 0 and 2 share a positive, 0 and 3 an anchor
    expected: list[float] = []
    for i in range(4):
        others = [
            math.exp(float(vectors[i, 0] @ vectors[j, 1]) / 0.1)
            for j in range(4)
            if i == j or (labels[i, 0] != labels[j, 0] and labels[i, 1] != labels[j, 1])
        ]
        if negatives:
            others += [math.exp(float(vectors[i, 0] @ vectors[j, 2]) / 0.1) for j in range(4)]
        right = math.exp(float(vectors[i, 0] @ vectors[i, 1]) / 0.1)
        expected.append(-math.log(right / sum(others)))
    assert float(info_nce(vectors, labels, 0.1)) == pytest.approx(sum(expected) / 4, abs=1e-5)


def test_ranks_are_those_of_a_plain_loop() -> None:
    draw = np.random.default_rng(0)
    vectors = draw.normal(size=(30, 2, 6)).astype(np.float32)
    labels = np.stack([np.arange(30) + 100, np.arange(30) // 2], axis=1)
    vectors[1::2, 1] = vectors[::2, 1]  # the same text has the same vector
    found = ranks_of(np.concatenate([vectors.reshape(30, -1), labels], axis=1))
    for i in range(30):
        near = {int(labels[j, 1]): float(vectors[i, 0] @ vectors[j, 1]) for j in range(30)}
        own = near.pop(int(labels[i, 1]))
        assert found[i] == 1 + sum(value > own for value in near.values())


def test_padding_and_the_batch_change_no_vector(folder: Path) -> None:
    ready = ready_of(folder)
    rows = TASK.encode(examples(pairs(4)), ready).features
    with torch.no_grad():
        together = TASK.forward(ready.model, TASK.collate(ready)(rows))["logits"]
        for row, vectors in zip(rows, together, strict=True):
            for ids, vector in zip(row["texts"], vectors, strict=True):
                states = ready.model(input_ids=torch.tensor([ids])).last_hidden_state[0].mean(0)
                expected = states / states.norm()
                torch.testing.assert_close(vector, expected, atol=1e-5, rtol=1e-5)


def test_a_run_learns_and_a_new_process_gives_vectors(folder: Path) -> None:
    settings = RunSettings(
        base=str(folder / "bert"),
        task="embedding",
        data={"train": str(folder / "pairs.jsonl"), "test_fraction": 0.3},
        method={"name": "lora", "r": 8, "targets": "all-linear"},
        train={"lr": 1e-2, "steps": 60, "batch_size": 12},
        out=str(folder / "run"),
    )
    result = run.train(settings)
    base = Predictor.load(folder / "run", base_only=True)
    trained = Predictor.load(folder / "run")
    before, after = (one.measure(examples(pairs(60)), 16).metrics["mrr"] for one in (base, trained))
    assert after > 1.5 * before
    assert run.evaluate(folder / "run")["metrics"] == pytest.approx(result.metrics["test"])
    code = (
        "import json, sys; from graftune.tasks.predicting import Predictor;"
        "print(json.dumps(Predictor.load(sys.argv[1]).predict(json.loads(sys.argv[2]))))"
    )
    asked = ["good parcel", {"query": "good parcel", "answer": "parcel now i"}]
    asked.append({"query": "good parcel", "answer": "money now i"})
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder / "run"), json.dumps(asked)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    alone, near, far = json.loads(done.stdout.strip().splitlines()[-1])
    assert len(alone["vector"]) == 32
    assert np.linalg.norm(alone["vector"]) == pytest.approx(1, abs=1e-5)
    assert alone["vector"] == pytest.approx(near["vector"], abs=1e-5)
    assert near["similarity"] > far["similarity"]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"query": "a", "answer": " "}, r'pairs.jsonl:1: the text \("answer"\) is empty'),
        ({"query": "a", "answer": 3}, "pairs.jsonl:1: .answer. is 3, expected a text"),
        ({"query": "a", "answer": "b", "negative": ""}, "the negative .* is '', no text"),
        ({"query": "a"}, "has no text_pair column"),
    ],
)
def test_rows_that_cannot_be_learnt_are_told(row: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        examples([row])


def test_one_partner_for_all_is_nothing_to_tell_apart() -> None:
    with pytest.raises(DataError, match="All 2 training rows have the same text_pair"):
        TASK.labels({"train": examples([{"query": q, "answer": "b"} for q in "ac"])})


def test_a_temperature_of_zero_is_refused() -> None:
    with pytest.raises(SettingsError, match="temperature"):
        find_task("embedding", {"temperature": 0})
