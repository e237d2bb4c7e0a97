"""An ensemble of prompts: one batch through all of them, and their votes."""

from __future__ import annotations

import pytest
import torch

import graftune as gt
from graftune.errors import AdapterError
from tests.families import FAMILIES

NAMES = ("a", "b", "c")


def said(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows).log()


def test_most_votes_win_over_the_surest_member() -> None:
    logits = said([0.6, 0.4], [0.6, 0.4], [0.01, 0.99])
    assert gt.vote(logits, 3).argmax(-1).tolist() == [0]
    assert gt.vote(logits, 3, how="mean").argmax(-1).tolist() == [1]
    assert torch.allclose(gt.vote(logits, 3, how="mean"), torch.tensor([[1.21, 1.79]]) / 3)


def test_a_tie_goes_to_the_likelier_and_never_past_a_vote() -> None:
    tie = said([0.6, 0.3, 0.1], [0.05, 0.9, 0.05])
    assert gt.vote(tie, 2).argmax(-1).tolist() == [1]
    third = said([0.51, 0.0, 0.49], [0.0, 0.51, 0.49])  # the mean's favourite, nobody's vote
    assert gt.vote(third, 2, how="mean").argmax(-1).tolist() == [2]
    shares = gt.vote(third, 2)
    assert shares.argmax(-1).item() in (0, 1)
    assert torch.allclose(shares.sum(-1), torch.ones(1))


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_prompts_of_one_batch_are_each_alone(family: str) -> None:
    model, inputs = FAMILIES[family].build(), FAMILIES[family].inputs(padding="right")
    for number, name in enumerate(NAMES):
        gt.attach(model, gt.PromptTuning(length=3 + number), name=name)
    with torch.no_grad():
        alone = []
        for name in NAMES:
            with gt.using(model, name):
                alone.append(model(**inputs).logits)
        with gt.using(model, gt.Parallel(*NAMES)):
            together = model(**inputs).logits
    expected = torch.stack(alone).softmax(-1).mean(0)
    assert torch.allclose(gt.vote(together, 3, how="mean"), expected, atol=1e-5)
    assert gt.vote(together, 3).shape == alone[0].shape
    assert not torch.allclose(alone[0], alone[1], atol=1e-4)


def test_prompts_are_trained_in_one_batch() -> None:
    model, inputs = FAMILIES["llama"].build(), FAMILIES["llama"].inputs()
    prompts = [gt.attach(model, gt.PromptTuning(length=2), name=name) for name in NAMES]
    gt.activate(model, gt.Parallel(*NAMES))
    model(**inputs, labels=inputs["input_ids"].repeat(3, 1)).loss.backward()
    together = [[p.grad.clone() for p in prompt.parameters()] for prompt in prompts]
    model.zero_grad()
    gt.activate(model, "b")
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    alone = [p.grad for p in prompts[1].parameters()]
    for part, whole in zip(together[1], alone, strict=True):
        assert torch.allclose(3 * part, whole, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "members", "how", "words"),
    [
        ((4, 2), 3, "mean", r"logits of shape \(4, 2\) aren't one block of rows for each of 3"),
        ((4,), 2, "mean", r"logits of shape \(4,\)"),
        ((4, 2), 0, "mean", "each of 0 members"),
        ((4, 2), 2, "majorty", r"how is 'majorty'.*Did you mean \"majority\"\?"),
    ],
)
def test_what_can_not_be_voted_on(
    shape: tuple[int, ...], members: int, how: str, words: str
) -> None:
    with pytest.raises(AdapterError, match=words):
        gt.vote(torch.zeros(shape), members, how=how)
