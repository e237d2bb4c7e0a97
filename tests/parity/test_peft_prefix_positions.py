"""A prefix with shift_positions answers as HF PEFT's PrefixTuning of the same keys and values."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import graftune as gt
from tests.families import FAMILIES
from tests.parity.exchange import peft, randomised

LENGTH = 3


def theirs(family: str) -> tuple[Any, Tensor]:
    """Returns PEFT's model off its start, and the prefixes of all layers, `(m, 2 L kv)`."""
    config = peft.PrefixTuningConfig(num_virtual_tokens=LENGTH, task_type=peft.TaskType.CAUSAL_LM)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(FAMILIES[family].build(), config).eval()
    randomised(wrapped)
    return wrapped, wrapped.prompt_encoder["default"].embedding.weight.detach()


def ours(family: str, made: Tensor, shift: bool) -> Any:
    """Returns our model with the same prefixes."""
    model = FAMILIES[family].build()
    method = gt.PrefixTuning(length=LENGTH, hidden=None, shift_positions=shift)
    adapter = gt.attach(model, method)
    tensors = [t for g in adapter.grafts for t in g.delta.parameters()]
    with torch.no_grad():
        for tensor, part in zip(tensors, made.split([t.shape[1] for t in tensors], 1), strict=True):
            tensor.copy_(part)
    return model


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt_neox", "qwen2"])
def test_the_logits_are_those_of_peft(family: str) -> None:
    wrapped, made = theirs(family)
    inputs = FAMILIES[family].inputs()
    with torch.no_grad():
        expected = wrapped(**inputs).logits
        got = ours(family, made, True)(**inputs).logits
        still = ours(family, made, False)(**inputs).logits
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert (still - expected).abs().max() > 1e-4, "positions change nothing: the test is void"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("padding", [None, "left"])
def test_what_is_generated_is_what_peft_generates(family: str, padding: Any) -> None:
    wrapped, made = theirs(family)
    inputs = FAMILIES[family].inputs(padding=padding)
    inputs.pop("position_ids", None)
    options: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    expected = wrapped.generate(**inputs, **options)
    got = ours(family, made, True).generate(**inputs, **options)
    assert torch.equal(got.sequences, expected.sequences)
    for mine, their in zip(got.logits, expected.logits, strict=True):
        torch.testing.assert_close(mine, their, atol=1e-5, rtol=1e-5)
