"""LLaMA-Adapter with one gate per layer answers as HF PEFT's AdaptionPrompt of the same tensors."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import graftune as gt
from tests.families import FAMILIES
from tests.parity.exchange import peft, randomised


def theirs(family: str, layers: int, **options: Any) -> tuple[Any, list[tuple[Tensor, Tensor]]]:
    """Returns PEFT's model off its start, and the prompt and gate of each layer from the top."""
    config = peft.AdaptionPromptConfig(
        adapter_len=4, adapter_layers=layers, task_type=peft.TaskType.CAUSAL_LM
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(FAMILIES[family].build(**options), config).eval()
    randomised(wrapped)
    found = [m for m in wrapped.modules() if hasattr(m, "adaption_gate")]
    return wrapped, [(m.adaption_prompt[0], m.adaption_gate) for m in found]


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("layers", [2, 1])
def test_the_logits_are_those_of_peft(family: str, layers: int) -> None:
    wrapped, tensors = theirs(family, layers)
    model, inputs = FAMILIES[family].build(), FAMILIES[family].inputs(padding="right")
    method = gt.LLaMAAdapter(length=4, gate="layer", layers=f"-{layers}:")
    adapter = gt.attach(model, method)
    with torch.no_grad():
        for graft, (P, gate) in zip(adapter.grafts, tensors, strict=True):
            graft.delta.P.copy_(P)
            graft.delta.gate.copy_(gate)
        expected, got = wrapped(**inputs).logits, model(**inputs).logits
    gt.activate(model, None)
    with torch.no_grad():
        assert (model(**inputs).logits - got).abs().max() > 1e-3
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
