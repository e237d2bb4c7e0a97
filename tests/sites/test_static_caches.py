"""Caches of a fixed size under prompts and prefixes: what `generate` says with growing ones."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import StaticCache

import graftune as gt
from graftune.errors import AdapterError
from tests.contract.subjects import logits
from tests.families import FAMILIES
from tests.sites.test_generate import DECODERS, METHODS, SHORT, same, scores, trained

PAST_THE_WINDOW = {"max_new_tokens": 20, "min_new_tokens": 20}
CASES = [(f, m) for f in DECODERS for m in METHODS if f == "llama" or m in ("prompt", "prefix")]
CASES += [("gemma2", "llamaadapter"), ("mistral", "llamaadapter"), ("bloom", "ptuning")]


def both(model: Any, inputs: dict[str, Tensor], **options: Any) -> tuple[Any, Any]:
    """Returns what is said with a growing cache and with one of fixed size."""
    said = []
    for cache in (None, "static"):
        torch.manual_seed(3)
        given = {**inputs, **SHORT, **options, "cache_implementation": cache}
        said.append(model.generate(**given))
    return said[0], said[1]


@pytest.mark.parametrize(("family", "method"), CASES)
def test_says_what_it_says_with_a_growing_cache(family: str, method: str) -> None:
    model, inputs = trained(family, method)
    for options in (
        PAST_THE_WINDOW,
        {"num_beams": 2, "do_sample": True},
        {"prefill_chunk_size": 3},
    ):
        grown, fixed = both(model, inputs, **options)
        assert same(fixed, grown)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "bloom"])
def test_a_prompt_after_the_first_token(family: str) -> None:
    model: Any = FAMILIES[family].build()
    gt.attach(model, gt.PromptTuning(length=3, position="after-first"))
    inputs = FAMILIES[family].inputs(padding="left")
    inputs.pop("position_ids", None)
    grown, fixed = both(model, inputs, **PAST_THE_WINDOW)
    assert same(fixed, grown)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_encoders_with_a_prompt(family: str) -> None:
    model, inputs = trained(family, "prompt")
    for options in ({}, {"num_beams": 2}):
        grown, fixed = both(model, inputs, **options)
        assert same(fixed, grown)


def test_rows_of_their_own_and_none_at_all() -> None:
    model, inputs = trained("gemma2", "prompt")
    gt.attach(model, gt.PromptTuning(length=5), name="longer", seed=2)
    gt.attach(model, gt.PrefixTuning(length=2), name="prefix", seed=3)
    rows = {name: value[:1].repeat(4, 1) for name, value in inputs.items()}
    for composition in (gt.Rows(["default", None, "longer", "prefix"]), None):
        with gt.using(model, composition):
            grown, fixed = both(model, rows, **PAST_THE_WINDOW)
        assert same(fixed, grown)


def test_a_gate_on_the_mean_of_real_tokens() -> None:
    model: Any = FAMILIES["llama"].build()
    inputs = FAMILIES["llama"].inputs(padding="left")
    inputs.pop("position_ids", None)
    gt.attach(model, gt.PromptTuning(length=3), name="prompt")
    gt.attach(model, gt.UniPELT(length=3, hidden=8, bottleneck=4, r=2), name="gated")
    gt.activate(model, gt.Stack("prompt", "gated"))
    grown, fixed = both(model, inputs)
    assert same(fixed, grown)


def test_a_cache_of_ones_own_is_used_again() -> None:
    model, inputs = trained("mistral", "prompt")
    inputs = {name: value[1:] for name, value in inputs.items()}
    plain = model.generate(**inputs, **SHORT)
    cache = StaticCache(model.config, max_cache_len=11)
    for _ in range(2):
        assert same(model.generate(**inputs, **SHORT, past_key_values=cache), plain)
        assert {layer.max_cache_len for layer in cache.layers} == {14}
        cache.reset()


def test_copies_have_masks_of_their_own() -> None:
    model, inputs = trained("bloom", "prompt")
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    _, expected = both(model, inputs)
    gt.activate(model, None)
    for twin in twins:
        assert same(both(twin, inputs)[1], expected)
    assert (scores(both(model, inputs)[1]) - scores(expected)).abs().max() > 1e-3


def test_detached_the_model_makes_its_own_masks() -> None:
    model, inputs = trained("gemma2", "prompt")
    before = FAMILIES["gemma2"].build()
    gt.activate(model, None)
    gt.detach(model, "default")
    assert vars(model).keys() == vars(before).keys()
    assert same(both(model, inputs)[1], both(before, inputs)[1])


def test_masks_of_attention_alone_are_refused() -> None:
    model, inputs = trained("llama", "prompt")
    square = torch.ones(2, 1, 7, 7, dtype=torch.bool)
    with pytest.raises(AdapterError, match=r"takes an attention_mask of \(rows, tokens\), found"):
        logits(model, {**inputs, "attention_mask": square})
