"""Answers scored in one padded batch, and T-Few's losses, against one plain sequence at a time."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from graftune.tasks.models import load_base
from graftune.tasks.scoring import AnswerTokens, EveryChoice, Scored, place_in_row, score_choices
from graftune.tasks.task import Ready
from tests.tasks import tiny

ROWS: list[dict[str, Any]] = [
    {"input_ids": [7, 8, 9], "choices": [[10, 3], [11, 12, 13, 3]], "labels": 1},
    {"input_ids": [8, 9, 7, 14, 9, 6], "choices": [[10, 3], [14, 3], [15, 7, 3]], "labels": 0},
    {"input_ids": [12], "choices": [[20, 21, 3], [22, 3]], "labels": 1},
]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_base(str(tiny.llama(tmp_path_factory.mktemp("llama"))), "lm").model


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_base(str(tiny.t5(tmp_path_factory.mktemp("t5"))), "lm").model


def token_chances(model: Any, prompt: list[int], answer: list[int]) -> list[float]:
    """Returns p of each token of one answer, from one sequence without padding."""
    found: list[float] = []
    for done, token in enumerate(answer):
        with torch.no_grad():
            if model.config.is_encoder_decoder:
                begun = torch.tensor([[0, *answer[:done]]])
                logits = model(input_ids=torch.tensor([prompt]), decoder_input_ids=begun).logits
            else:
                logits = model(input_ids=torch.tensor([prompt + answer[:done]])).logits
        found.append(torch.softmax(logits[0, -1].double(), -1)[token].item())
    return found


def slow_losses(model: Any) -> dict[str, float]:
    """Returns each loss, a mean over the rows, by the paper's sums."""
    totals = dict.fromkeys(("lm", "unlikelihood", "length-normalised"), 0.0)
    for row in ROWS:
        chances = [token_chances(model, row["input_ids"], answer) for answer in row["choices"]]
        betas = [sum(math.log(p) for p in one) / len(one) for one in chances]
        right = row["labels"]
        wrong = [p for index, one in enumerate(chances) if index != right for p in one]
        totals["lm"] -= betas[right]
        totals["unlikelihood"] -= sum(math.log(1 - p) for p in wrong) / len(wrong)
        whole = sum(math.exp(beta) for beta in betas)
        totals["length-normalised"] -= math.log(math.exp(betas[right]) / whole)
    return {name: total / len(ROWS) for name, total in totals.items()}


@pytest.mark.parametrize("kind", ["llama", "t5"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_each_loss_is_the_papers_sum(kind: str, side: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(kind)
    batch = EveryChoice(0, 0 if kind == "t5" else None, side=side)(ROWS)
    with torch.no_grad():
        scored = score_choices(model, batch)
    expected = slow_losses(model)
    for name, value in expected.items():
        assert scored.loss(batch["labels"], [name]).item() == pytest.approx(value, rel=2e-5)  # type: ignore[list-item]
    together = scored.loss(batch["labels"], ("lm", "unlikelihood", "length-normalised"))
    assert together.item() == pytest.approx(sum(expected.values()), rel=2e-5)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_every_choice_of_a_row_is_scored_in_one_batch(
    kind: str, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(kind)
    calls: list[int] = []
    handle = model.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    batch = EveryChoice(0, 0 if kind == "t5" else None)(ROWS)
    with torch.no_grad():
        table = score_choices(model, batch).table
    handle.remove()
    assert calls == [7]
    assert table.shape == (3, 3)
    for row, found in zip(ROWS, table, strict=True):
        for answer, beta in zip(row["choices"], found, strict=False):
            chances = token_chances(model, row["input_ids"], answer)
            expected = sum(math.log(p) for p in chances) / len(chances)
            assert beta.item() == pytest.approx(expected, rel=2e-5)
        assert (found[len(row["choices"]) :] == -math.inf).all()


def test_prompts_and_padding_are_no_targets() -> None:
    batch = EveryChoice(0)(ROWS[:2])
    assert batch["labels"].tolist() == [1, 0]
    assert batch["row"].tolist() == [0, 0, 1, 1, 1]
    assert batch["targets"][0].tolist() == [-100] * 3 + [10, 3] + [-100] * 4
    assert batch["attention_mask"][0].tolist() == [1] * 5 + [0] * 4
    left = EveryChoice(0, side="left")(ROWS[:2])
    assert left["targets"][0].tolist() == [-100] * 7 + [10, 3]
    assert "labels" not in EveryChoice(0)([{"input_ids": [7], "choices": [[8], [9]]}])


def test_a_decoder_starts_with_its_own_token() -> None:
    batch = EveryChoice(0, 5)(ROWS[:1])
    assert batch["decoder_input_ids"].tolist() == [[5, 10, 0, 0], [5, 11, 12, 13]]
    assert batch["targets"].tolist() == [[10, 3, -100, -100], [11, 12, 13, 3]]
    assert batch["input_ids"].tolist() == [[7, 8, 9]] * 2


def test_numbers_in_a_row_begin_anew() -> None:
    assert place_in_row(torch.tensor([0, 0, 1, 2, 2, 2])).tolist() == [0, 1, 0, 0, 1, 2]


def test_a_wrong_answer_that_is_certain_has_a_finite_loss_and_gradient() -> None:
    logits = torch.full((2, 1, 4), -200.0)
    logits[:, :, 2] = 200.0
    logits.requires_grad_()
    scored = Scored(logits, torch.tensor([[1], [2]]), torch.tensor([0, 0]))
    loss = scored.loss(torch.tensor([0]), ("lm", "unlikelihood", "length-normalised"))
    loss.backward()
    assert math.isfinite(loss.item())
    assert isinstance(logits.grad, Tensor)
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("template", [tiny.CHATML, None])
def test_an_answers_tokens_follow_the_prompts_as_in_the_whole(
    template: str | None, tmp_path: Path
) -> None:
    base = load_base(str(tiny.llama(tmp_path, template=template)), "lm")
    tokens = AnswerTokens(Ready(base.model, base.tokenizer, [], 64))
    got = tokens.of_prompt("say hello now") + tokens.of_choice("yes good")
    tokenizer: Any = base.tokenizer
    if template:
        turns = [
            {"role": "user", "content": "say hello now"},
            {"role": "assistant", "content": "yes good"},
        ]
        text = tokenizer.apply_chat_template(turns, tokenize=False).rstrip("\n")
    else:
        text = "say hello now yes good<|im_end|>"
    assert got == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert got[-1] == tokenizer.eos_token_id


def test_an_encoder_decoders_answer_ends_once(tmp_path: Path) -> None:
    base = load_base(str(tiny.t5(tmp_path)), "lm")
    tokens = AnswerTokens(Ready(base.model, base.tokenizer, [], 64))
    assert tokens.of_choice("yes")[-1] == base.tokenizer.eos_token_id
    assert tokens.of_choice("yes").count(base.tokenizer.eos_token_id) == 1
