"""Virtual tokens made of real tokens' embeddings answer as these tokens do in the text."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graftune as gt
from graftune.errors import AdapterError
from graftune.methods.prompt import PromptTuning
from tests.contract.subjects import logits
from tests.families import FAMILIES, FIRST

WORDS = (11, 23, 47)
TEXT = tuple(f for f in FAMILIES if f not in ("whisper", "vit", "swin", "clip"))
DECODERS = tuple(f for f in TEXT if FAMILIES[f].kind == "decoder")
SHORT: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}


def of_words(words: tuple[int, ...] = WORDS, **settings: Any) -> PromptTuning:
    return PromptTuning(length=len(words), init="text", init_tokens=words, **settings)


def spelled(inputs: dict[str, Tensor], at: list[int], words: tuple[int, ...] = WORDS) -> Any:
    """Returns inputs with the words in the text of each row, before the token at `at`."""
    found: dict[str, list[Tensor]] = {"input_ids": [], "attention_mask": []}
    for row, place in enumerate(at):
        for name, new in (
            ("input_ids", torch.tensor(words)),
            ("attention_mask", torch.ones(len(words))),
        ):
            old = inputs[name][row]
            found[name].append(torch.cat([old[:place], new.to(old), old[place:]]))
    made = {name: torch.stack(rows) for name, rows in found.items()}
    if "position_ids" in inputs:
        made["position_ids"] = (made["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return {**inputs, **made}


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-5) -> bool:
    return bool((got - expected).abs().max() <= tolerance * max(1.0, expected.abs().max().item()))


@pytest.mark.parametrize("side", [None, "right", "left"])
@pytest.mark.parametrize("position", ["front", "after-first"])
@pytest.mark.parametrize("family", TEXT)
def test_words_in_the_prompt_are_words_in_the_text(family: str, position: str, side: Any) -> None:
    kind = FAMILIES[family]
    model, inputs = kind.build(), kind.inputs(padding=side)
    first = inputs["attention_mask"].argmax(1) + (position == "after-first")
    whole = spelled(inputs, first.tolist())
    pools_first = kind.kind == "encoder" and (position == "front" or side == "left")
    if pools_first:  # compare hidden states: the text's first token is another
        body: Any = model.base_model
        expected = body(**whole).last_hidden_state
    else:
        expected = logits(model, whole)
    gt.attach(model, of_words(position=position), name="words")
    got = model.base_model(**inputs).last_hidden_state if pools_first else logits(model, inputs)
    if kind.kind == "decoder" or pools_first:
        expected = torch.stack(
            [torch.cat([row[:at], row[at + 3 :]]) for row, at in zip(expected, first, strict=True)]
        )
        shown = inputs["attention_mask"].bool()
        expected, got = expected[shown], got[shown]
    assert got.shape == expected.shape
    assert close(got, expected)


@pytest.mark.parametrize("side", [None, "left"])
@pytest.mark.parametrize("family", [*DECODERS, "t5", "mt5", "bart"])
def test_generates_as_after_the_words(family: str, side: Any) -> None:
    kind = FAMILIES[family]
    model: Any = kind.build()
    inputs = {
        k: v for k, v in kind.inputs(padding=side).items() if k in ("input_ids", "attention_mask")
    }
    whole = spelled(inputs, inputs["attention_mask"].argmax(1).tolist())
    decodes = kind.kind == "decoder"
    expected = model.generate(**whole, **SHORT)
    beams = model.generate(**whole, **SHORT, num_beams=2)
    gt.attach(model, of_words(), name="words")
    for options, wanted in (
        ({}, expected),
        ({"use_cache": False}, expected),
        ({"num_beams": 2}, beams),
    ):
        got = model.generate(**inputs, **SHORT, **options)
        assert torch.equal(got[:, -5:], wanted[:, -5:])
        if decodes:
            assert torch.equal(got[:, :-5], inputs["input_ids"])


@pytest.mark.parametrize("family", DECODERS)
def test_a_cache_that_holds_a_prompt_goes_on_with_it(family: str) -> None:
    kind = FAMILIES[family]
    model: Any = kind.build()
    inputs = kind.inputs()
    gt.attach(model, of_words(), name="words")
    expected = logits(model, inputs)[:, 4:]
    start = model(input_ids=inputs["input_ids"][:, :4], use_cache=True)
    rest = {"input_ids": inputs["input_ids"][:, 4:], "past_key_values": start.past_key_values}
    assert close(logits(model, {**rest, "attention_mask": inputs["attention_mask"]}), expected)


@pytest.mark.parametrize("family", TEXT)
def test_rows_with_prompts_of_any_length_are_each_row_alone(family: str) -> None:
    kind = FAMILIES[family]
    model: Any = kind.build()
    gt.attach(model, of_words(), name="long")
    gt.attach(model, of_words((31,)), name="short")
    inputs = kind.inputs(batch=3)
    members = ["short", None, "long"]
    if family == "bart":
        with pytest.raises(AdapterError, match="one length"):
            gt.activate(model, gt.Rows(members))
        return
    with gt.using(model, gt.Rows(members)):
        mixed = logits(model, inputs)
        said = model.generate(**inputs, **SHORT) if kind.generates else None
    for row, member in enumerate(members):
        one = {k: v[row : row + 1] for k, v in inputs.items()}
        with gt.using(model, member):
            assert close(logits(model, one), mixed[row : row + 1])
            if said is not None:
                assert torch.equal(model.generate(**one, **SHORT)[0], said[row])


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_compositions_of_prompts(family: str) -> None:
    kind = FAMILIES[family]
    model: Any = kind.build()
    inputs = kind.inputs()
    gt.attach(model, of_words((*WORDS, 31)), name="both")
    expected = logits(model, inputs)
    gt.attach(model, of_words(), name="words")
    gt.attach(model, of_words((31,)), name="last")
    gt.activate(model, gt.Stack("words", "last"))
    assert torch.equal(logits(model, inputs), expected)
    gt.attach(model, of_words((32,)), name="other")
    gt.activate(model, gt.Average("last", "other", weights=(0.25, 0.75)))
    got = logits(model, inputs)
    last, other = (list(gt.adapters(model)[name].parameters()) for name in ("last", "other"))
    with torch.no_grad():
        for tensor, twin in zip(last, other, strict=True):  # its head's values, where it has one
            tensor.copy_(0.25 * tensor + 0.75 * twin)
    gt.activate(model, "last")
    assert close(got, logits(model, inputs), 1e-6)
    gt.activate(model, gt.Average("last", "words"))
    with pytest.raises(AdapterError, match="one length"):
        logits(model, inputs)
    gt.activate(model, gt.Parallel("words", None))
    both = logits(model, inputs)
    for at, member in enumerate(("words", None)):
        with gt.using(model, member):
            assert close(both[2 * at : 2 * at + 2], logits(model, inputs))


def test_base_models_alone_and_their_copies() -> None:
    model = FAMILIES["llama"].build().model
    inputs = FAMILIES["llama"].inputs()
    adapter = gt.attach(model, of_words(), name="words")
    assert list(adapter.state_dict()) == ["prompt.tokens"]
    out = model(**inputs)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(**inputs).last_hidden_state, out.last_hidden_state)
    out = model(**inputs, output_hidden_states=True)
    assert {tuple(h.shape) for h in out.hidden_states} == {(2, 7, 32)}
    assert torch.equal(model(**inputs, return_dict=False)[0], out.last_hidden_state)
    assert torch.equal(model(*inputs.values()).last_hidden_state, out.last_hidden_state)
    gt.activate(model, gt.Parallel("words", None))
    assert torch.equal(model(**inputs).last_hidden_state[:2], out.last_hidden_state)


def test_labels_are_the_texts_own() -> None:
    kind = FAMILIES["gpt2"]
    model, inputs = kind.build(), kind.inputs(padding="right")
    gt.attach(model, of_words(), name="words")
    labelled = {**inputs, **kind.labels(model, inputs)}
    said = model(**labelled)
    assert said.logits.shape[1] == 7
    shifted = nn.functional.cross_entropy(
        said.logits[:, :-1].flatten(0, 1), labelled["labels"][:, 1:].flatten(), ignore_index=-100
    )
    torch.testing.assert_close(said.loss, shifted)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"input_ids": None, "inputs_embeds": torch.zeros(2, 7, 32)}, "found inputs_embeds"),
        ({"attention_mask": torch.ones(2, 1, 7, 7)}, "attention_mask of"),
        ({"position_ids": torch.zeros(3, 2, 7, dtype=torch.long)}, "position_ids of"),
        ({"input_ids": torch.full((2, 62), FIRST), "attention_mask": None}, "more than the 64"),
    ],
)
def test_what_a_prompt_can_not_be_put_into(change: dict[str, Any], words: str) -> None:
    model = FAMILIES["gpt2"].build()
    gt.attach(model, of_words(), name="words")
    with pytest.raises(AdapterError, match=words):
        model(**{**FAMILIES["gpt2"].inputs(), **change})


def test_prompts_in_different_positions_do_not_act_together() -> None:
    model = FAMILIES["llama"].build()
    gt.attach(model, of_words(), name="front")
    gt.attach(model, of_words(position="after-first"), name="after")
    gt.activate(model, gt.Stack("front", "after"))
    with pytest.raises(AdapterError, match="same position"):
        logits(model, FAMILIES["llama"].inputs())


def test_an_embedding_of_another_scale_is_met() -> None:
    model = FAMILIES["bart"].build(scale_embedding=True)
    inputs = FAMILIES["bart"].inputs()
    expected = logits(model, spelled(inputs, [0, 0]))
    gt.attach(model, of_words(), name="words")
    assert close(logits(model, inputs), expected)
