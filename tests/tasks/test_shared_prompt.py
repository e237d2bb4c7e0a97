"""Sharing a prompt changes nothing: scores and answers are those of whole sequences."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from graftune.errors import SettingsError
from graftune.tasks.prompt_costs import PromptCosts
from graftune.tasks.shared_prompt import SharedPrompt, batches_of_one_length, begin, common_start
from graftune.tasks.task import Ready
from tests.families import FAMILIES

DECODERS = [name for name, family in FAMILIES.items() if family.kind == "decoder"]
START = [5, 9, 7, 11, 6, 8, 10, 12, 9, 14, 5, 20, 31, 44, 52, 6, 7, 8, 33, 71]
"""Longer than the sliding windows of the families that have one."""
PROMPTS = [[*START, *rest] for rest in ([13, 5], [7], [8, 14], [6, 9, 13], [11])]
ANSWERS = [[[5], [7, 9], [6, 8, 14]]] * 4 + [[[14, 14], [12]]]


def ready_of(family: str) -> Ready:
    return Ready(FAMILIES[family].build(), None, [], 64)


def whole(model: Any, prompt: list[int], answer: list[int]) -> float:
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *answer]])).logits[0]
    chances = torch.log_softmax(logits.float(), dim=-1)
    places = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
    return float(sum(chances[at, token] for at, token in zip(places, answer, strict=True)))


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_scores_are_those_of_whole_sequences(family: str, batch_size: int) -> None:
    ready = ready_of(family)
    found = SharedPrompt(ready, START).scores(PROMPTS, ANSWERS, batch_size)
    for prompt, answers, scores in zip(PROMPTS, ANSWERS, found, strict=True):
        expected = torch.tensor([whole(ready.model, prompt, answer) for answer in answers])
        torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", DECODERS)
def test_shared_logits_are_the_uncached_ones(family: str) -> None:
    ready = ready_of(family)
    shared = SharedPrompt(ready, START)
    rest = [prompt[len(START) :] for prompt in (PROMPTS[0], PROMPTS[2])]
    logits, _ = shared._run(shared._copy(2), rest)
    with torch.no_grad():
        expected = ready.model(torch.tensor([PROMPTS[0], PROMPTS[2]])).logits[:, len(START) :]
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


def test_the_shared_part_stays_as_it_was() -> None:
    shared = SharedPrompt(ready_of("llama"), START)
    first = shared.scores(PROMPTS, ANSWERS, 4)
    again = shared.scores(PROMPTS, ANSWERS, 4)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_tokens_are_counted_once_where_they_are_run_once() -> None:
    shared = SharedPrompt(ready_of("llama"), START)
    assert shared.tokens == len(START)
    shared.scores(PROMPTS, ANSWERS, 4)
    questions = sum(len(prompt) - len(START) for prompt in PROMPTS)
    longer = 4 * (1 + 2) + 1  # of each answer all but its last token
    assert shared.tokens == len(START) + questions + longer


def test_nothing_need_be_shared() -> None:
    ready = ready_of("gpt2")
    alone = SharedPrompt(ready, []).scores(PROMPTS, ANSWERS, 4)
    shared = SharedPrompt(ready, START).scores(PROMPTS, ANSWERS, 4)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(alone, shared, strict=True))


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "mistral"])
def test_generated_answers_are_those_of_whole_prompts(family: str) -> None:
    ready = ready_of(family)
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    shared = SharedPrompt(ready, START)
    said = {
        index: ids
        for indices, found in shared.continued(PROMPTS, 3, eos_token_id=[2], **settings)
        for index, ids in zip(indices, found, strict=True)
    }
    for index, prompt in enumerate(PROMPTS):
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        expected = ready.model.generate(ids, attention_mask=mask, eos_token_id=[2], **settings)
        assert said[index] == expected[0, len(prompt) :].tolist()


def test_what_prompts_have_in_common_is_kept_while_it_fits() -> None:
    ready, costs = ready_of("llama"), PromptCosts()
    first = begin(None, ready, [*START, 3], PROMPTS, costs)
    assert first.ids == START
    assert begin(first, ready, [*START, 3], PROMPTS, costs) is first
    assert costs.start_tokens == len(START)
    assert begin(first, ready, START[:4], PROMPTS, costs).ids == START[:4]


def test_a_question_always_keeps_a_token_of_its_own() -> None:
    assert common_start([[1, 2, 3], [1, 2, 3]]) == 2
    assert common_start([[1]]) == 0
    assert list(batches_of_one_length([[1, 2], [1], [3, 4], [5]], 1)) == [[0], [2], [1], [3]]


def test_a_model_that_keeps_nothing_cannot_share() -> None:
    ready = Ready(FAMILIES["bert"].build(), None, [], 64)
    with pytest.raises(SettingsError, match=r"keeps no keys and values .* method.share: false"):
        SharedPrompt(ready, START)
