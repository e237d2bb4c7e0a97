"""Every soft prompt of HF PEFT on every decoder: PEFT's answers are ours wherever they are right.

Texts and what is generated go past the sliding windows of Mistral and Gemma 2, of 16 tokens. Where
PEFT's answer isn't that of the method, a table says so and why, and the test holds it to that.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import graftune as gt
from graftune.errors import FormatError
from tests.families import FAMILIES
from tests.parity.exchange import answer, peft, randomised

DECODERS = [name for name, family in FAMILIES.items() if family.kind == "decoder"]
TASKS = torch.tensor([2, 0])
LENGTH = {"num_virtual_tokens": 4, "task_type": "CAUSAL_LM"}
KINDS: dict[str, Any] = {
    "prompt": peft.PromptTuningConfig(**LENGTH),
    "p-tuning": peft.PromptEncoderConfig(**LENGTH, encoder_hidden_size=8),
    "multitask": peft.MultitaskPromptTuningConfig(**LENGTH, num_tasks=3),
    "prefix": peft.PrefixTuningConfig(**LENGTH),
    "adaption": peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=2, task_type="CAUSAL_LM"),
}
PROMPTS = ("prompt", "p-tuning", "multitask")

FAR_FROM_ITS_PROMPT = "rows padded on the left"
HIDDEN_BY_THE_WINDOW = "a prefix and a sliding window"
WRONG: dict[tuple[str, str, str], str] = {
    **{
        (kind, family, "left"): FAR_FROM_ITS_PROMPT
        for kind in PROMPTS
        for family in DECODERS
        if family not in ("opt", "bloom")  # which find positions in the mask
    },
    **{
        ("prefix", family, way): HIDDEN_BY_THE_WINDOW
        for family in ("mistral", "gemma2")
        for way in ("text", "generated", "left")
    },
}
"""Where PEFT computes something else, and which row of the exchange page says what."""

REFUSED = {
    ("prefix", "bloom"): "take positions, which bias the attention",
    ("adaption", "gpt2"): "on llama and mistral alone, this is gpt2",
}
"""What PEFT computes otherwise for every text, so that we don't load it."""

CASES = [
    (kind, family)
    for kind in KINDS
    for family in DECODERS
    if (kind, family) not in REFUSED and (kind != "adaption" or family in ("llama", "mistral"))
]


def both(kind: str, family: str, path: Path) -> tuple[Any, Any]:
    """Returns PEFT's model, and ours with what PEFT saved."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(FAMILIES[family].build(), copy.copy(KINDS[kind])).eval()
        randomised(wrapped)
        if kind == "multitask":  # whose factors begin near zero, and their product nearer
            with torch.no_grad():
                for tensor in wrapped.parameters():
                    tensor.normal_() if tensor.requires_grad else tensor
        wrapped.save_pretrained(path)
    model = FAMILIES[family].build()
    gt.load(model, path, name="a")
    return wrapped, model


def generated(model: Any, inputs: dict[str, Tensor], **more: Any) -> Tensor:
    """Returns the logits of 12 tokens, `(B, 12, vocabulary)`."""
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    wanted = {"output_logits": True, "return_dict_in_generate": True}
    given = {name: tensor for name, tensor in inputs.items() if name != "position_ids"}
    return torch.stack(model.generate(**given, **settings, **wanted, **more).logits, 1)


@pytest.mark.filterwarnings("ignore:Position ids are not supported")
@pytest.mark.parametrize(("kind", "family"), CASES)
def test_pefts_answers_are_ours_where_they_are_right(
    kind: str, family: str, tmp_path: Path
) -> None:
    theirs, ours = both(kind, family, tmp_path / "a")
    build, more = FAMILIES[family].inputs, {"task_ids": TASKS} if kind == "multitask" else {}
    text, start, padded = build(length=24), build(length=14), build(length=14, padding="left")
    pairs = {"text": (answer(theirs, {**text, **more}), answer(ours, {**text, **more}))}
    with gt.using(ours, "a", tasks=TASKS.tolist() if more else None):
        for way, inputs in (("generated", start), ("left", padded)):
            pairs[way] = (generated(theirs, inputs, **more), generated(ours, inputs))
    gt.activate(ours, None)
    assert (answer(ours, text) - pairs["text"][1]).abs().max() > 1e-3, "void: nothing changes"
    for way, (expected, got) in pairs.items():
        apart = float((got - expected).abs().max())
        assert (apart > 1e-2) if (kind, family, way) in WRONG else (apart < 1e-5), (way, apart)


@pytest.mark.parametrize(("kind", "family"), REFUSED)
def test_what_peft_computes_otherwise_for_every_text_is_refused(
    kind: str, family: str, tmp_path: Path
) -> None:
    with pytest.raises(FormatError, match=REFUSED[kind, family]):
        both(kind, family, tmp_path / "a")


@pytest.mark.parametrize("family", sorted({*DECODERS} - {"llama", "mistral", "gpt2"}))
def test_peft_has_no_adaption_prompts_for_the_others(family: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Unsupported model type for adaption prompt"):
        both("adaption", family, tmp_path / "a")


def test_the_exchange_page_explains_every_difference() -> None:
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "exchange.md").read_text()
    for row in {*WRONG.values(), "a prefix where positions bias", "LLaMA-Adapter on GPT-2"}:
        assert f"| {row}" in page
