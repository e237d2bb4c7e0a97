"""Virtual tokens in the places of markers answer as the tokens they are made of do there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import graftune as gt
from graftune.errors import AdapterError
from graftune.methods.ptuning import PTuning
from tests.contract.subjects import logits
from tests.families import FAMILIES
from tests.sites.test_embedding import DECODERS, SHORT, TEXT, WORDS, close

MARKER = 98
PLACES = ((2, 3, 5), (3, 4, 6))


def attached(model: Any, words: tuple[int, ...] = WORDS, name: str = "words", marker: int = MARKER):
    method = PTuning(length=len(words), encoder="none", marker=marker, train_head=False)
    adapter = gt.attach(model, method, name=name)
    [tokens] = adapter.parameters()
    with torch.no_grad():
        tokens.copy_(model.get_input_embeddings()(torch.tensor(words)))
    return adapter


def templates(family: str, padding: Any = None, words: Any = WORDS) -> tuple[Any, Any]:
    """Returns inputs with markers, and the same with words in their places."""
    inputs = FAMILIES[family].inputs(padding=padding)
    marked, spelled = inputs["input_ids"].clone(), inputs["input_ids"].clone()
    first = inputs["attention_mask"].argmax(1)
    for row, places in enumerate(PLACES if padding is None else ((1, 2, 4), (1, 2, 4))):
        at = torch.tensor(places) + first[row]
        marked[row, at] = MARKER
        spelled[row, at] = torch.tensor(words)
    return {**inputs, "input_ids": marked}, {**inputs, "input_ids": spelled}


@pytest.mark.parametrize("padding", [None, "right", "left"])
@pytest.mark.parametrize("family", TEXT)
def test_words_in_the_markers_places_are_words_in_the_text(family: str, padding: Any) -> None:
    model = FAMILIES[family].build()
    marked, spelled = templates(family, padding)
    expected, untouched = logits(model, spelled), logits(model, marked)
    attached(model)
    assert close(logits(model, marked), expected, 1e-6)
    with gt.using(model, None):
        assert torch.equal(logits(model, marked), untouched)


@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("family", [*DECODERS, "t5", "bart"])
def test_generates_as_after_the_words(family: str, padding: Any) -> None:
    model: Any = FAMILIES[family].build()
    marked, spelled = (
        {name: given[name] for name in ("input_ids", "attention_mask")}
        for given in templates(family, padding)
    )
    ways: list[dict[str, Any]] = [{}, {"use_cache": False}, {"num_beams": 2}]
    if family in ("llama", "gemma2"):
        ways.append({"cache_implementation": "static"})
    options = {**SHORT, "suppress_tokens": [MARKER]}
    expected = [model.generate(**spelled, **options, **way) for way in ways]
    attached(model)
    for way, wanted in zip(ways, expected, strict=True):
        got = model.generate(**marked, **options, **way)
        assert torch.equal(got[:, -5:], wanted[:, -5:])


def test_a_template_after_a_text_that_is_cached() -> None:
    model: Any = FAMILIES["llama"].build()
    marked, _ = templates("llama")
    attached(model, WORDS[:1])
    ids = marked["input_ids"].clone()
    ids[:, 5:][ids[:, 5:] == MARKER] = 7
    ids[0, 3] = 7
    ids[1, 4] = 7  # one marker in each row: at 2 and at 3
    expected = logits(model, {"input_ids": ids})[:, 2:]
    with gt.using(model, None):
        start = model(input_ids=ids[:, :2], use_cache=True)
    rest = {"input_ids": ids[:, 2:], "past_key_values": start.past_key_values}
    assert close(logits(model, rest), expected)


def test_rows_and_compositions() -> None:
    model: Any = FAMILIES["llama"].build()
    marked, spelled = templates("llama")
    plain = logits(model, marked)
    attached(model, WORDS[:2], "two")
    attached(model, WORDS[2:], "one")
    expected = logits(FAMILIES["llama"].build(), spelled)
    gt.activate(model, gt.Stack("two", "one"))  # the markers are the first's, then the second's
    assert close(logits(model, marked), expected, 1e-6)
    attached(model, (0, 0, 0), "other")
    attached(model, WORDS, "words")
    with gt.using(model, gt.Rows([None, "words"])):
        rows = logits(model, marked)
    assert close(rows[0], plain[0], 1e-6)
    assert close(rows[1], expected[1], 1e-6)
    ids = marked["input_ids"].clone()
    ids[0, 5] = 7  # two markers in one row, three in the other
    with gt.using(model, gt.Rows(["two", "words"])):
        rows = logits(model, {"input_ids": ids})
    assert close(rows[1], expected[1], 1e-6)
    with gt.using(model, gt.Average("words", "other", weights=(1.0, 0.0))):
        assert close(logits(model, marked), expected, 1e-6)
    with gt.using(model, gt.Parallel("words", None)):
        both = logits(model, marked)
    assert close(both, torch.cat([expected, plain]), 1e-6)


def test_beside_a_prompt_in_front_and_another_marker() -> None:
    model: Any = FAMILIES["llama"].build()
    marked, spelled = templates("llama")
    gt.attach(model, gt.PromptTuning(length=2), name="front", seed=0)
    expected = logits(model, spelled)
    attached(model)
    gt.activate(model, gt.Stack("front", "words"))
    assert close(logits(model, marked), expected, 1e-6)
    attached(model, (41,), "else", marker=97)
    marked["input_ids"][:, 0] = 97
    spelled["input_ids"][:, 0] = 41
    with gt.using(model, "front"):
        expected = logits(model, spelled)
    gt.activate(model, gt.Stack("front", "else", "words"))
    assert close(logits(model, marked), expected, 1e-6)


@pytest.mark.parametrize("change", [(0, 2, 7), (1, 0, MARKER)])
def test_another_number_of_markers_is_an_error(change: tuple[int, int, int]) -> None:
    model = FAMILIES["llama"].build()
    marked, _ = templates("llama")
    attached(model)
    row, at, token = change
    ids = marked["input_ids"]
    ids[row, at] = token
    count = int((ids[row] == MARKER).sum())
    with pytest.raises(
        AdapterError, match=f"Row {row} holds the marker {MARKER} {count} times, expected 3"
    ):
        logits(model, marked)
    with pytest.raises(AdapterError, match="Row 0 holds the marker 98 0 times"):
        logits(model, {"input_ids": torch.full((2, 4), 7)})


def test_embeddings_of_ones_own_are_refused() -> None:
    model = FAMILIES["llama"].build()
    attached(model)
    with pytest.raises(AdapterError, match="found inputs_embeds"):
        model(inputs_embeds=torch.zeros(1, 4, 32))


def test_only_the_markers_places_get_gradients() -> None:
    model: Any = FAMILIES["llama"].build()
    marked, _ = templates("llama")
    adapter = attached(model)
    seen: list[Tensor] = []
    handle = model.model.layers[0].register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    model(**marked).logits.sum().backward()
    handle.remove()
    assert seen[0].shape == (2, 7, 32)
    [tokens] = adapter.parameters()
    assert tokens.grad is not None
    assert tokens.grad.abs().sum(1).gt(0).all()
