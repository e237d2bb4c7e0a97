"""A trained prompt turned into a prefix: the same answers, without its tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import graftune as gt
from graftune.errors import AdapterError
from tests.contract.subjects import logits, shake
from tests.families import FAMILIES

FAMILIES_WITH_ONE = ["llama", "gpt2", "gpt_neox", "opt", "qwen2", "qwen3", "phi3", "mixtral"]
PROMPT = gt.PromptTuning(length=4)
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


def prompted(family: str, method: Any = PROMPT, **options: Any) -> tuple[Any, gt.Adapter]:
    """Returns a model with a prompt off its start."""
    model = FAMILIES[family].build(**options)
    adapter = gt.attach(model, method, "prompt", seed=1)
    shake(adapter, seed=2, noise=0.3)
    return model, adapter


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES_WITH_ONE)
@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_it_answers_as_the_prompt_does(family: str, padding: Any) -> None:
    model, _ = prompted(family)
    inputs = FAMILIES[family].inputs(padding=padding)
    real = inputs["attention_mask"].bool()
    expected = logits(model, inputs)
    prefix = gt.as_prefix(model, "prompt", "prefix")
    close(logits(model, inputs)[real], expected[real])
    gt.activate(model, None)
    assert (logits(model, inputs) - expected)[real].abs().max() > 1e-2
    assert isinstance(prefix.method, gt.PrefixTuning)
    assert (prefix.method.length, prefix.method.hidden) == (4, None)


@pytest.mark.parametrize("family", FAMILIES_WITH_ONE)
def test_it_generates_as_the_prompt_does(family: str) -> None:
    model, _ = prompted(family)
    inputs = FAMILIES[family].inputs(padding="left")
    inputs.pop("position_ids", None)
    settings = {**GREEDY, "output_logits": True, "return_dict_in_generate": True}
    expected = model.generate(**inputs, **settings)
    gt.as_prefix(model, "prompt", "prefix")
    for more in ({}, {"use_cache": False}, {"num_beams": 1, "prefill_chunk_size": 3}):
        got = model.generate(**inputs, **settings, **more)
        assert torch.equal(got.sequences, expected.sequences)
        for mine, theirs in zip(got.logits, expected.logits, strict=True):
            close(mine, theirs)


def test_other_adapters_act_in_neither() -> None:
    model, _ = prompted("llama")
    inputs = FAMILIES["llama"].inputs()
    expected = logits(model, inputs)
    shake(gt.attach(model, gt.LoRA(r=4), "lora", seed=3), seed=3, noise=0.3)
    gt.as_prefix(model, "prompt", "prefix")
    close(logits(model, inputs), expected)


@pytest.mark.parametrize(
    ("method", "task"),
    [
        (gt.PTuning(length=3, hidden=8), None),
        (gt.MultitaskPromptTuning(length=3, tasks=2), 1),
        (gt.MultitaskPromptTuning(length=3), None),
    ],
)
def test_any_prompt_in_front_is_taken(method: Any, task: Any) -> None:
    model, _ = prompted("llama", method)
    inputs = FAMILIES["llama"].inputs()
    with gt.using(model, "prompt", tasks=None if task is None else [task]):
        expected = logits(model, inputs)
    gt.as_prefix(model, "prompt", "prefix", task=task)
    close(logits(model, inputs), expected)


def test_a_head_goes_along_and_the_file_is_a_prefix_for_peft_too(tmp_path: Path) -> None:
    model = FAMILIES["llama"].build(task="classification")
    adapter = gt.attach(model, PROMPT, "prompt", seed=1)
    shake(adapter, seed=2, noise=0.3)
    inputs = FAMILIES["llama"].inputs(task="classification")
    expected = logits(model, inputs)
    prefix = gt.as_prefix(model, "prompt", "prefix")
    assert prefix.head_names == adapter.head_names == ("score",)
    close(logits(model, inputs), expected)
    prefix.save(tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["peft_type"] == "PREFIX_TUNING"
    fresh = FAMILIES["llama"].build(task="classification")
    assert gt.load(fresh, tmp_path / "a").method == prefix.method
    assert torch.equal(logits(fresh, inputs), logits(model, inputs))


def test_it_trains_on_as_a_prefix_does() -> None:
    model, adapter = prompted("llama")
    prefix, before = gt.as_prefix(model, "prompt", "prefix"), adapter.state_dict()
    inputs = FAMILIES["llama"].inputs()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(t.grad is not None and t.grad.abs().sum() > 0 for t in prefix.parameters())
    assert all(t.grad is None for t in adapter.parameters())
    assert all(torch.equal(before[name], t) for name, t in adapter.state_dict().items())


REFUSED: dict[str, tuple[str, Any, str]] = {
    "an encoder": (
        "bert",
        gt.PromptTuning(position="front"),
        "isn't a decoder alone.* a prompt sees the text",
    ),
    "an encoder-decoder": ("t5", PROMPT, "isn't a decoder alone"),
    "after the first": ("llama", gt.PromptTuning(position="after-first"), "isn't in front"),
    "at a marker": ("llama", gt.PTuning(length=2, hidden=8, marker=7), "isn't in front"),
    "behind the embeddings": ("bert", gt.PromptTuning(enters="blocks"), "isn't a decoder alone"),
    "a window": ("mistral", PROMPT, "a sliding window, which hides a prompt from later tokens"),
    "a window in turn": ("gemma2", PROMPT, "a sliding window"),
    "positions in scores": ("bloom", PROMPT, "takes no position_ids"),
    "no prompt": ("llama", gt.LoRA(r=2), "it is LoRA, which has no prompt"),
    "several tasks": ("llama", gt.MultitaskPromptTuning(tasks=2), r"it has 2 tasks.*\(task=\)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_prefix_can_answer_is_refused_with_the_reason(name: str) -> None:
    family, method, words = REFUSED[name]
    model, _ = prompted(family, method)
    with pytest.raises(AdapterError, match=f'as_prefix can\'t take "prompt": .*{words}'):
        gt.as_prefix(model, "prompt", "prefix")
    assert list(gt.adapters(model)) == ["prompt"]


def test_unknown_names_are_said() -> None:
    model, _ = prompted("llama")
    with pytest.raises(AdapterError, match="promt"):
        gt.as_prefix(model, "promt", "prefix")
    with pytest.raises(AdapterError, match="prompt"):
        gt.as_prefix(model, "prompt", "prompt")
