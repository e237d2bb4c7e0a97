"""Answers shown how to answer: earlier turns of the chat are run once, and measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from graftune.errors import DataError, SettingsError
from graftune.tasks import run
from graftune.tasks.chat import IGNORED, prompt_tokens
from graftune.tasks.chat_prompt import ChatPrompt
from graftune.tasks.data import Example
from graftune.tasks.in_context import Demonstrations, InContext
from graftune.tasks.instruct import Instruct
from graftune.tasks.models import load_base
from graftune.tasks.settings import RunSettings
from graftune.tasks.task import Ready
from tests.tasks import tiny

SHOWN = [
    {
        "messages": [
            {"role": "system", "content": "good day"},
            {"role": "user", "content": f"say {word}"},
            {"role": "assistant", "content": f"{word} now"},
        ]
    }
    for word in ("parcel", "money")
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("base") / "llama")


def prompt(base: Path, room: int = 128, **settings: Any) -> ChatPrompt:
    found = load_base(str(base), "causal-lm")
    ready = Ready(found.model, found.tokenizer, [], room)
    return ChatPrompt(InContext(**settings), ready, Demonstrations(list(SHOWN)), room)


def asked(*texts: str) -> list[Example]:
    return [Instruct().question(text, f"row {n}") for n, text in enumerate(texts)]


def test_the_rows_come_first_without_their_system_turns(base: Path) -> None:
    turns = prompt(base, instruction="say it").before(SHOWN)
    assert [turn["role"] for turn in turns] == ["system", *["user", "assistant"] * 2]
    assert turns[0]["content"] == "say it"
    own = [{"role": "system", "content": "you can"}]
    assert prompt(base, instruction="say it").before(SHOWN, own)[0]["content"] == "you can"
    assert prompt(base).before([]) == []


@pytest.mark.parametrize("share", [True, False])
def test_answers_are_those_of_whole_chats(share: bool, base: Path) -> None:
    made = prompt(base, share=share)
    texts = ["say refund", "what is my parcel now", "hello you"]
    answers = made.answers(asked(*texts), batch_size=2, max_new_tokens=5)
    tokenizer, model = made.ready.tokenizer, made.ready.model
    for text, found in zip(texts, answers, strict=True):
        turns = [turn for row in SHOWN for turn in row["messages"][1:]]
        ids = prompt_tokens(tokenizer, [*turns, {"role": "user", "content": text}])
        expected = model.generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=5, do_sample=False, eos_token_id=[3], pad_token_id=0,
        )[0, len(ids) :]  # fmt: skip
        assert found["answer"] == tokenizer.decode(expected, skip_special_tokens=True).strip()
        assert found["messages"] == [{"role": "user", "content": text}]
    assert made.costs.rows == 3
    assert (made.costs.tokens < made.costs.tokens_alone) is share


def test_the_last_answer_alone_is_labelled(base: Path) -> None:
    made = prompt(base)
    turns = [{"role": "user", "content": "say no"}, {"role": "assistant", "content": "no day"}]
    (row,) = made.features([Example({"messages": turns}, "", "", "row 1")])
    labels = [label for label in row["labels"] if label != IGNORED]
    assert made.ready.tokenizer.decode(labels).replace(" ", "") == "noday<|im_end|>"
    first = prompt(base)
    first.shown = Demonstrations([])
    (bare,) = first.features([Example({"messages": turns}, "", "", "row 1")])
    assert row["input_ids"][-len(bare["input_ids"]) :] == bare["input_ids"]


def test_a_question_without_room_for_an_answer_is_told(base: Path) -> None:
    with pytest.raises(DataError, match=r"row 0: \d+ tokens and 100 for the answer"):
        prompt(base).answers(asked("hello"), batch_size=2, max_new_tokens=100)


def settings(base: Path, out: Path, **method: Any) -> RunSettings:
    data = tiny.write_jsonl(out.parent / "lessons.jsonl", tiny.lessons())
    return RunSettings(
        base=str(base), task="instruct", data=str(data), out=str(out),
        method={"name": "in-context", "shots": 2, **method},
    )  # fmt: skip


@pytest.mark.parametrize("select", ["random", "nearest"])
def test_a_run_is_measured_and_answers_as_an_adapters(
    select: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graftune.tasks.in_context_run.LONGEST_ANSWER", 8)
    base = tiny.llama(tmp_path / "llama")
    found = run.train(settings(base, tmp_path / "run", select=select))
    assert found.metrics["test"].keys() == {"perplexity", "token_accuracy"}
    assert run.evaluate(tmp_path / "run")["metrics"] == pytest.approx(found.metrics["test"])
    rows = [json.loads(line) for line in (tmp_path / "run/predictions.test.jsonl").open()]
    assert all(row["messages"][-1]["role"] == "assistant" for row in rows)
    (answer,) = run.predict(tmp_path / "run", ["say yes"], max_new_tokens=4)
    assert answer["messages"] == [{"role": "user", "content": "say yes"}]
    shown = run.plan(settings(base, tmp_path / "other"))["prompt"]
    assert shown.count("assistant: hello yes good day") == 2
    assert shown.splitlines()[-1].startswith("user: say ")


@pytest.mark.parametrize(
    ("method", "told"),
    [
        ({"template": "{text}"}, "method.template is for tasks with labels"),
        ({"labels": "random"}, "method.labels is for tasks with labels"),
        ({"select": "balanced"}, "method.select is for tasks with labels"),
        ({"shots": 12}, r"\(12 demonstrations .* takes 128: \d shots would fit"),
    ],
)
def test_what_cannot_be_is_told_first(
    method: dict[str, Any], told: str, base: Path, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match=told):
        run.train(settings(base, tmp_path / "run", **method))
    assert not (tmp_path / "run").exists()
