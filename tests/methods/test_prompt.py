"""Prompt tuning: initial values, counts, settings, training."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import graftune as gt
from graftune.errors import SettingsError
from graftune.methods.prompt import PromptTuning
from tests.families import FAMILIES


def tokens(model: Any, **settings: Any) -> torch.Tensor:
    return gt.attach(model, PromptTuning(**settings), seed=3).state_dict()["model.prompt.tokens"]


def test_initial_values() -> None:
    def fresh(**settings: Any) -> tuple[torch.Tensor, torch.Tensor]:
        model = FAMILIES["llama"].build()
        return tokens(model, **settings), model.get_input_embeddings().weight

    drawn, table = fresh(length=6)
    assert all(any(torch.equal(row, word) for word in table) for row in drawn)
    random, _ = fresh(length=200, init="random")
    assert random.abs().max() <= 0.5
    assert random.std() == pytest.approx(12**-0.5, rel=0.05)
    text, table = fresh(length=5, init="text", init_tokens=[9, 8])
    assert torch.equal(text, table[[9, 8, 9, 8, 9]])
    cut, table = fresh(length=2, init="text", init_tokens=[9, 8, 7])
    assert torch.equal(cut, table[[9, 8]])
    labels, table = fresh(length=4, init="class_labels", init_tokens=[9, 8])
    assert torch.equal(labels[:2], table[[9, 8]])
    assert all(any(torch.equal(row, word) for word in table) for row in labels[2:])


def test_is_not_drawn_from_what_an_adapter_makes_of_the_table() -> None:
    model = FAMILIES["llama"].build()
    other = gt.attach(model, gt.LoRA(r=2, targets="embeddings"), name="other")
    with torch.no_grad():
        for tensor in other.parameters():
            tensor.fill_(1.0)
    got = tokens(model, length=1, init="text", init_tokens=[9])
    assert torch.equal(got, model.get_input_embeddings().weight[[9]])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"length": 0}, "length is 0, expected at least 1"),
        ({"init": "rando"}, "expected one of"),
        ({"position": "end"}, "expected one of front"),
        ({"init": "text"}, "expected a list of token ids"),
        ({"init_tokens": [3]}, "which goes with"),
        ({"init": "text", "init_tokens": [-3]}, "holds -3"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        PromptTuning(**settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"length": 64}, "leaves no room"),
        ({"init": "text", "init_tokens": [99]}, "the model has 99 tokens"),
    ],
)
def test_settings_that_do_not_fit_the_model(settings: dict[str, Any], words: str) -> None:
    model = FAMILIES["gpt2"].build()
    with pytest.raises(SettingsError, match=words):
        gt.attach(model, PromptTuning(**settings))
    assert not gt.adapters(model)


def test_training_learns() -> None:
    kind = FAMILIES["llama"]
    model, inputs = kind.build(), kind.inputs()
    adapter = gt.attach(model, PromptTuning(length=8), seed=0)
    optimizer = torch.optim.AdamW(list(adapter.parameters()), lr=0.1)
    losses = []
    for _ in range(60):
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
