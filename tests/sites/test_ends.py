"""Which tokens are the first and the last of their rows: by masks, caches, rows and copies."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import graftune as gt
from graftune.errors import AdapterError
from graftune.sites import masks
from graftune.sites.ends import ends
from tests.contract.subjects import logits, shake
from tests.families import FAMILIES


def marked(
    mask: Any, first: int, last: int, tokens: int = 5, rows: int = 2, before: int = 0
) -> list[list[float]]:
    """Returns tokens of zeros to which the first add 1 and the last 2."""
    h = torch.zeros(rows, tokens, 3)
    with masks.seen_as(masks.Noted({"decoder": mask}, before={"decoder": before})):
        for number, chosen in enumerate(ends("decoder", h, first, last, "It"), 1):
            if chosen is not None:
                h = chosen.changed(h, lambda x, n=number: x + n)
    assert torch.equal(h, h[..., :1].expand_as(h))
    return h[..., 0].tolist()


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (None, [[1, 1, 0, 0, 2], [1, 1, 0, 0, 2]]),
        ([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]], [[1, 1, 0, 0, 2], [0, 0, 1, 1, 2]]),
        ([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0]], [[1, 1, 2, 0, 0], [1, 2, 0, 0, 0]]),
        ([[1, 0, 1, 0, 1], [0, 0, 0, 0, 1]], [[1, 0, 1, 0, 2], [0, 0, 0, 0, 2]]),
        ([[0, 0, 0, 0, 0], [1, 1, 1, 1, 1]], [[0, 0, 0, 0, 0], [1, 1, 0, 0, 2]]),
    ],
    ids=["none", "left", "right", "holes", "empty"],
)
def test_padding_is_counted_as_nothing(mask: Any, expected: list[list[float]]) -> None:
    assert marked(None if mask is None else torch.tensor(mask), 2, 1) == expected


@pytest.mark.parametrize(("first", "last"), list(itertools.product(range(8), range(8))))
def test_more_than_a_row_has_is_all_of_it_and_the_last_win(first: int, last: int) -> None:
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    found = marked(mask, first, last)
    for row, real in zip(found, ([1, 2, 3, 4], [0, 1]), strict=True):
        expected = [0.0] * 5
        for token in real[:first]:
            expected[token] = 1.0
        for token in real[len(real) - min(last, len(real)) :]:
            expected[token] = 2.0
        assert row == expected
    assert marked(None, first, last) == marked(torch.ones(2, 5), first, last)


def test_what_goes_on_with_a_cache_counts_what_it_holds_and_has_no_last() -> None:
    assert marked(None, 3, 2, tokens=2, before=2) == [[1, 0], [1, 0]]
    assert marked(None, 3, 2, tokens=2, before=3) == [[0, 0], [0, 0]]
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    assert marked(mask, 3, 2, tokens=2, before=3) == [[1, 1], [0, 0]]
    assert marked(mask, 2, 2, tokens=1, before=4) == [[0], [0]]


@pytest.mark.parametrize("kind", ["bool", "added", "mapping"])
def test_a_mask_of_attention_with_a_cache_tells_it_too(kind: str) -> None:
    real = torch.tensor([[0, 0, 1, 1, 1, 0], [1, 1, 1, 1, 1, 0]]).bool()[:, None, None]
    visible = real & torch.ones(6, 6).tril().bool()
    given: Any = visible if kind == "bool" else torch.where(visible, 0.0, -1e9)

    def asked(tokens: int, before: int) -> list[list[float]]:
        rows: Any = given[:, :, before : before + tokens]
        if kind == "mapping":
            rows = {"sliding_attention": rows * 0 - 1, "full_attention": rows}
        return marked(rows, 2, 1, tokens=tokens, before=before)

    assert asked(5, 0) == [[0, 0, 1, 1, 2], [1, 1, 0, 0, 2]]
    assert asked(1, 3) == [[1], [0]]
    assert asked(1, 4) == [[0], [0]]


def test_a_window_of_the_last_tokens_is_enough() -> None:
    window = torch.tensor([[0, 1, 1], [1, 1, 1]]).bool()[:, None, None]
    assert marked(window, 2, 1, tokens=1, before=9) == [[1], [0]]
    assert marked(torch.ones(2, 9), 2, 1, tokens=1, before=0) == [[2], [2]]


def test_it_is_found_once_a_pass() -> None:
    h = torch.zeros(2, 5, 3)
    with masks.seen_as(masks.Noted({"decoder": torch.ones(2, 5)})):
        found = ends("decoder", h, 2, 1, "It")
        assert ends("decoder", h, 2, 1, "It") is found
        assert ends("decoder", h, 1, 1, "It") is not found
        with masks.of_rows(slice(0, 1), 2):
            row = ends("decoder", h[:1], 2, 1, "It")
            assert ends("decoder", h[:1], 2, 1, "It") is row
            assert row is not found


def test_rows_and_copies_have_masks_of_their_own() -> None:
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    with masks.seen_as(masks.Noted({"encoder": mask})):
        x = torch.zeros(4, 3, 2)
        assert masks.whole("encoder", x, "It").tolist() == (mask != 0).tolist() * 2  # type: ignore[union-attr]
        with masks.of_rows(torch.tensor([1, 2]), 4):
            found: Any = masks.whole("encoder", x[:2], "It")
            assert found.tolist() == [[True, True, True], [False, True, True]]


@pytest.mark.parametrize(
    ("mask", "shape", "words"),
    [
        (torch.ones(2, 1, 5, 5), (2, 5, 3), r"It needs an attention_mask of \(rows, tokens\)"),
        (torch.ones(2, 9), (2, 5, 3), r"\(2, 5, 3\); found \(2, 9\)\."),
        (None, (10, 3), r"answers \(10, 3\), expected \(rows, tokens, width\)"),
    ],
)
def test_what_cannot_be_counted_is_refused(mask: Any, shape: Any, words: str) -> None:
    noted = masks.Noted({"encoder": mask})
    with masks.seen_as(noted), pytest.raises(AdapterError, match=words):
        ends("encoder", torch.zeros(shape), 1, 1, "It")


# -- In models ----------------------------------------------------------------------------------


def attached(family: str, seed: int = 1, **settings: Any) -> Any:
    model = FAMILIES[family].build()
    shake(gt.attach(model, gt.LoReFT(r=2, **settings), "task", seed=seed), seed, noise=0.5)
    return model


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_is_the_row_alone(side: Any) -> None:
    model = attached("gpt2", prefix_positions=2, suffix_positions=2)
    padded = FAMILIES["gpt2"].inputs(padding=side)
    real = padded["attention_mask"][0].bool()
    one = {name: value[:1, real] for name, value in padded.items()}
    alone = logits(model, one)[0]
    assert torch.allclose(logits(model, padded)[0, real], alone, atol=1e-5)
    del one["attention_mask"]
    assert torch.allclose(logits(model, one)[0], alone, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "padding"),
    [
        *itertools.product(("llama", "gpt2", "gemma2", "bloom"), (None, "left")),
        *itertools.product(("t5", "bart"), (None, "right")),
    ],
)
def test_short_prompts_get_the_rest_of_the_first_tokens_in_generation(
    family: str, padding: Any
) -> None:
    model = attached(family, prefix_positions=4)
    inputs = FAMILIES[family].inputs(length=5, padding=padding)  # 3 real tokens in the first row
    if family in ("t5", "bart"):
        del inputs["decoder_input_ids"]
    options: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    found = [
        model.generate(**inputs, **options, **more)
        for more in (
            {},
            {"use_cache": False},
            {"cache_implementation": "static", "disable_compile": True},
        )
    ]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_the_last_tokens_of_a_prompt_are_not_those_generated() -> None:
    model = attached("llama", prefix_positions=0, suffix_positions=2)
    inputs = FAMILIES["llama"].inputs()
    seen: list[Tensor] = []
    block = model.model.layers[0]
    block.register_forward_hook(lambda *call: seen.append(call[2].clone()))
    with torch.no_grad():
        cache = model(**inputs).past_key_values
        more = {"input_ids": inputs["input_ids"][:, :1], "past_key_values": cache}
        model(**more)
        with gt.using(model, None):
            cache.crop(-1)
            model(**more)
    assert torch.equal(seen[1], seen[2])


@pytest.mark.parametrize(
    "prompt",
    [gt.PromptTuning(length=3), gt.PromptTuning(length=3, enters="blocks", stays=True)],
    ids=["embedded", "behind"],
)
@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_a_prompts_tokens_are_the_first(prompt: Any, padding: Any) -> None:
    model = FAMILIES["bert"].build()
    gt.attach(model, prompt, "prompt", seed=0)
    shake(gt.attach(model, gt.LoReFT(prefix_positions=3), "task", seed=1), 1)
    gt.activate(model, gt.Stack("prompt", "task"))
    inputs, found = FAMILIES["bert"].inputs(padding=padding), []
    model.bert.encoder.layer[0].register_forward_hook(lambda *call: found.append(call[2].clone()))
    logits(model, inputs)
    with gt.using(model, "prompt"):
        logits(model, inputs)
    differ = (found[0] - found[1]).abs().amax(-1) > 1e-4
    assert differ.sum(1).tolist() == [3, 3]


def test_copies_of_the_batch_are_counted_as_their_rows() -> None:
    model = attached("bert", prefix_positions=2, suffix_positions=1)
    shake(gt.attach(model, gt.LoReFT(r=2), "other", seed=3), 3, noise=0.5)
    inputs = FAMILIES["bert"].inputs(padding="right")
    gt.activate(model, gt.Parallel("task", "other"))
    both = logits(model, inputs)
    for name, part in zip(("task", "other"), both.chunk(2), strict=True):
        with gt.using(model, name):
            assert torch.allclose(logits(model, inputs), part, atol=1e-6)
