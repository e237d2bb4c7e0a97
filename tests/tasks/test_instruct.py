import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from graftune.errors import DataError
from graftune.tasks.chat import IGNORED
from graftune.tasks.data import Example
from graftune.tasks.instruct import Instruct
from graftune.tasks.models import load_base
from graftune.tasks.settings import Columns
from graftune.tasks.tables import Table
from graftune.tasks.task import Ready
from tests.tasks import tiny

TASK = Instruct()


def examples(rows: list[dict[str, Any]], **named: str) -> list[Example]:
    table = Table(rows, "lessons.jsonl", list(range(1, len(rows) + 1)))
    return TASK.examples(table, TASK.columns(table, Columns(**named)))


def ready_in(folder: Path, max_length: int = 64, **options: Any) -> Ready:
    base = load_base(str(tiny.llama(folder, **options)), "causal-lm")
    return Ready(base.model, base.tokenizer, [], max_length)


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Ready:
    return ready_in(tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "say", "input": "hello", "output": "yes"},
        {"instruction": "say", "context": "hello", "response": "yes", "category": "qa"},
        {"messages": [{"role": "user", "content": "say\n\nhello"},
                      {"role": "assistant", "content": "yes"}]},
    ],
)  # fmt: skip
def test_alpaca_dolly_and_messages_are_the_same_conversation(row: dict[str, Any]) -> None:
    assert examples([row])[0].fields["messages"] == [
        {"role": "user", "content": "say\n\nhello"},
        {"role": "assistant", "content": "yes"},
    ]


def test_missing_answers_are_told() -> None:
    with pytest.raises(DataError, match="has no answer column"):
        examples([{"instruction": "say"}])
    with pytest.raises(DataError, match="no message is the assistant's"):
        examples([{"messages": [{"role": "user", "content": "say"}]}])


def test_every_row_trains_its_end_token(ready: Ready) -> None:
    encoded = TASK.encode(examples(tiny.lessons(4)), ready)
    for row in encoded.features:
        assert [t for t in row["labels"] if t != IGNORED][-1] == ready.tokenizer.eos_token_id
    assert encoded.notes == []


def test_what_long_conversations_lose_is_said(ready: Ready) -> None:
    rows = [{"instruction": "say " * 90, "answer": "yes"}, *tiny.lessons(1)]
    encoded = TASK.encode(examples(rows), ready)
    assert max(len(row["input_ids"]) for row in encoded.features) == 64
    assert encoded.notes[0].startswith("1 of 2 conversations are longer than 64 tokens")
    assert encoded.notes[0].endswith("1 lost part of the prompt.")


def test_a_tokenizer_without_a_template_gets_a_plain_one(tmp_path: Path) -> None:
    found = ready_in(tmp_path, template=None)
    notes = TASK.prepare(found.tokenizer)
    row = TASK.encode(examples(tiny.lessons(1)), found).features[0]
    assert "no chat template" in notes[0]
    assert [t for t in row["labels"] if t != IGNORED][-1] == found.tokenizer.eos_token_id


def test_a_tokenizer_without_an_end_token_is_refused(ready: Ready) -> None:
    before = ready.tokenizer.eos_token
    ready.tokenizer.eos_token = None
    try:
        with pytest.raises(DataError, match="no end token"):
            TASK.prepare(ready.tokenizer)
    finally:
        ready.tokenizer.eos_token = before


def test_metrics_count_answer_tokens_only(ready: Ready) -> None:
    labels = torch.tensor([[IGNORED, IGNORED, 1, 2], [IGNORED, 3, IGNORED, IGNORED]])
    logits = torch.zeros(2, 4, 5)
    logits[0, 1, 1] = 9.0
    logits[1, 0, 4] = 9.0
    summary = TASK.summarise(logits, labels)
    chosen = torch.stack([logits[0, 1], logits[0, 2], logits[1, 0]])
    loss = torch.nn.functional.cross_entropy(chosen, torch.tensor([1, 2, 3]))
    found = TASK.score(summary.numpy(), None)
    assert summary[:, 1].tolist() == [2, 1]
    assert found["perplexity"] == pytest.approx(math.exp(loss.item()), rel=1e-5)
    assert found["token_accuracy"] == pytest.approx(1 / 3)


def test_summaries_of_a_model_give_its_own_loss(ready: Ready) -> None:
    row = TASK.encode(examples(tiny.lessons(1)), ready).features[0]
    ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
    with torch.no_grad():
        out: Any = ready.model(input_ids=ids, labels=labels)
    found = TASK.score(np.asarray(TASK.summarise(out.logits, labels)), None)
    assert math.log(found["perplexity"]) == pytest.approx(out.loss.item(), rel=1e-5)


def test_batched_answers_equal_single_ones(ready: Ready) -> None:
    asked = [TASK.question(text, "row") for text in ("say hello", "say", "where is my money now")]
    together = TASK.answer(asked, ready, batch_size=3, max_new_tokens=6)
    alone = TASK.answer(asked, ready, batch_size=1, max_new_tokens=6)
    assert together == alone


def test_a_question_drops_the_answer_it_is_asked_with() -> None:
    row = {"messages": examples(tiny.lessons(1))[0].fields["messages"]}
    assert [m["role"] for m in TASK.question(row, "row").fields["messages"]] == ["user"]


def test_no_room_for_a_question_is_told(ready: Ready) -> None:
    asked = [TASK.question("say", "row")]
    with pytest.raises(DataError, match="max_new_tokens is 128, but the model holds 128"):
        TASK.answer(asked, ready, batch_size=1, max_new_tokens=128)
