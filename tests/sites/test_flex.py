"""Prefixes before flex attention: the answers are those of sdpa, run here without its compiler."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from transformers import DynamicCache

import graftune as gt
from graftune.sites import flex
from tests.contract.subjects import logits, shake
from tests.families import FAMILIES

TEXTS = ("llama", "mistral", "gemma2", "bert", "modernbert", "bart", "opt")


@pytest.fixture(autouse=True)
def plainly() -> Iterator[None]:
    """Lets flex attention run as written: compiling it takes half a minute a shape."""
    with torch.compiler.set_stance("force_eager"):
        yield


def prefixed(family: str, attention: str, *lengths: int, **options: Any) -> Any:
    """Returns a model with prefixes "a", "b" of some lengths, the last one active."""
    model = FAMILIES[family].build(attn_implementation=attention, **options)
    for at, (n, name) in enumerate(zip(lengths, "ab", strict=False)):
        method = gt.PrefixTuning(length=n, hidden=None, train_head=False)
        gt.attach(model, method, name, seed=at)
    return model


def other(family: str) -> str:
    return FAMILIES[family].attention or "sdpa"


def check(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", [*TEXTS, "vit"])
@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_it_answers_as_sdpa(family: str, padding: Any) -> None:
    if family == "vit" and padding:
        return
    inputs = FAMILIES[family].inputs(padding=padding)
    real = inputs["attention_mask"].bool() if family in ("llama", "mistral", "opt") else ...
    got = logits(prefixed(family, "flex_attention", 3), inputs)
    check(got[real], logits(prefixed(family, other(family), 3), inputs)[real])


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_sliding_windows_hide_what_they_did_and_no_prefix(family: str) -> None:
    inputs, options = FAMILIES[family].inputs(length=14), {"sliding_window": 4}
    model = prefixed(family, "flex_attention", 3, **options)
    expected = logits(prefixed(family, other(family), 3, **options), inputs)
    check(logits(model, inputs), expected)
    cache, steps = DynamicCache(config=model.config), []
    with torch.no_grad():
        for at in range(14):
            ids = inputs["input_ids"][:, at : at + 1]
            steps.append(model(input_ids=ids, past_key_values=cache, use_cache=True).logits)
    check(torch.cat(steps, 1), expected)


def test_rows_may_have_prefixes_of_different_lengths() -> None:
    inputs = FAMILIES["llama"].inputs(batch=5, padding="left")
    members = gt.Rows(["b", None, "a", gt.Stack("a", "b"), "b"])
    answers = []
    for attention in ("flex_attention", "sdpa"):
        model = prefixed("llama", attention, 3, 5)
        with gt.using(model, members):
            answers.append(logits(model, inputs)[inputs["attention_mask"].bool()])
    check(*answers)


def test_generate_with_and_without_a_cache() -> None:
    inputs = FAMILIES["llama"].inputs(padding="left")
    inputs.pop("position_ids")
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    model = prefixed("llama", "flex_attention", 3)
    expected = prefixed("llama", "sdpa", 3).generate(**inputs, **options)
    assert torch.equal(model.generate(**inputs, **options), expected)
    assert torch.equal(model.generate(**inputs, use_cache=False, **options), expected)


@pytest.mark.parametrize("is_bool", [True, False])
def test_a_mask_of_ones_own_is_added(is_bool: bool) -> None:
    inputs = FAMILIES["llama"].inputs()
    visible = torch.ones(2, 1, 7, 7, dtype=torch.bool).tril()
    number = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo().min)
    given = {"input_ids": inputs["input_ids"], "attention_mask": visible if is_bool else number}
    check(
        logits(prefixed("llama", "flex_attention", 3), given),
        logits(prefixed("llama", "sdpa", 3), inputs),
    )


def test_gated_prompts_need_no_mask() -> None:
    inputs, answers = FAMILIES["llama"].inputs(), []
    for attention in ("flex_attention", "sdpa"):
        model = FAMILIES["llama"].build(attn_implementation=attention)
        shake(gt.attach(model, gt.LLaMAAdapter(length=3), seed=0), seed=1, noise=1)
        answers.append(logits(model, inputs))
    check(*answers)


@pytest.mark.gpu
def test_gradients_are_those_of_sdpa() -> None:
    """Only on a GPU: flex attention has no backward pass on CPUs."""
    kind, found = FAMILIES["llama"], []
    for attention in ("flex_attention", "sdpa"):
        model = prefixed("llama", attention, 3).cuda()
        inputs = {**kind.inputs(), **kind.labels(model, kind.inputs())}
        loss = model(**{name: tensor.cuda() for name, tensor in inputs.items()}).loss
        found.append(torch.autograd.grad(loss, list(gt.adapters(model)["a"].parameters())))
    for got, expected in zip(*found, strict=True):
        check(got, expected)


def test_training_on_a_cpu_is_refused_by_torch_and_never_wrong() -> None:
    kind, model = FAMILIES["llama"], prefixed("llama", "flex_attention", 3)
    with pytest.raises(NotImplementedError, match="does not support backward on CPU"):
        model(**kind.inputs(), **kind.labels(model, kind.inputs()))


def test_a_mask_is_made_once_for_all_layers() -> None:
    def causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return q >= k

    mask = create_block_mask(causal, 3, None, 200, 200, device="cpu")
    made = flex.longer(mask, 5)
    assert made is flex.longer(mask, 5)
    assert made.seq_lengths == (200, 205)
    assert made.to_dense().shape[-2:] == (2, 2)
    some = flex.of_rows(mask, slice(1, 3))
    assert some.kv_num_blocks.shape[0] == 2
    assert flex.of_rows(mask, torch.tensor([2, 0])) is flex.of_rows(mask, torch.tensor([2, 0]))
    alone = create_block_mask(causal, 1, None, 200, 200, device="cpu")
    assert flex.of_rows(alone, slice(0, 1)) is alone


def test_a_switch_of_the_model_is_seen() -> None:
    model, inputs = prefixed("llama", "sdpa", 3), FAMILIES["llama"].inputs()
    expected = logits(model, inputs)
    model.set_attn_implementation("flex_attention")
    check(logits(model, inputs), expected)
    assert model.config._attn_implementation == "graftune_flex_attention"
    gt.activate(model, None)
    gt.detach(model, "a")
    assert model.config._attn_implementation == "flex_attention"
