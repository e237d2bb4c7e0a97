"""Virtual tokens before the decoder's own, of an encoder-decoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import graftune as gt
from graftune.errors import AdapterError, SettingsError
from tests.contract.subjects import logits, shake
from tests.families import FAMILIES
from tests.sites.test_embedding import close, of_words, spelled

FAMILIES_OF_TWO = ("t5", "mt5", "bart", "whisper")
SHORT: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
PROMPTS: dict[str, Any] = {
    "prompt": gt.PromptTuning,
    "multitask": gt.MultitaskPromptTuning,
    "ptuning": gt.PTuning,
}


def batch(family: str) -> dict[str, Tensor]:
    """Returns inputs whose decoder's first row is padded on the right."""
    inputs = FAMILIES[family].inputs(padding=None if family == "whisper" else "right")
    if family != "whisper":
        inputs["decoder_attention_mask"] = torch.ones_like(inputs["decoder_input_ids"])
        inputs["decoder_attention_mask"][0, -2:] = 0
    return inputs


def spelled_out(inputs: dict[str, Tensor], at: int) -> dict[str, Tensor]:
    """Returns inputs with the words in what the decoder reads, before its token at `at`."""
    own = {k.removeprefix("decoder_"): v for k, v in inputs.items() if k.startswith("decoder_")}
    own.setdefault("attention_mask", torch.ones_like(own["input_ids"]))
    made = spelled(own, [at] * len(own["input_ids"]))
    if "decoder_attention_mask" not in inputs:
        del made["attention_mask"]
    return {**inputs, **{f"decoder_{name}": value for name, value in made.items()}}


@pytest.mark.parametrize("position", ["front", "after-first"])
@pytest.mark.parametrize("family", FAMILIES_OF_TWO)
def test_words_in_the_prompt_are_words_in_the_text(family: str, position: str) -> None:
    model, inputs = FAMILIES[family].build(), batch(family)
    at = int(position == "after-first")
    expected = logits(model, spelled_out(inputs, at))
    expected = torch.cat([expected[:, :at], expected[:, at + 3 :]], dim=1)
    adapter = gt.attach(model, of_words(position=position, where="decoder"), name="words")
    assert close(logits(model, inputs), expected)
    assert [name.endswith("decoder.prompt.tokens") for name in adapter.state_dict()] == [True]


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_both_are_the_words_in_both(family: str) -> None:
    model, inputs = FAMILIES[family].build(), batch(family)
    whole = spelled_out(inputs, 0)
    text = spelled({k: inputs[k] for k in ("input_ids", "attention_mask")}, [0, 0])
    expected = logits(model, {**whole, **text})[:, 3:]
    gt.attach(model, of_words(where="both"), name="words")
    assert close(logits(model, inputs), expected)


@pytest.mark.parametrize("family", FAMILIES_OF_TWO)
def test_generates_as_after_the_words(family: str) -> None:
    kind = FAMILIES[family]
    model: Any = kind.build()
    inputs = {k: v for k, v in kind.inputs().items() if not k.startswith("decoder_")}
    start: int = model.config.decoder_start_token_id
    words = (start, 23, 47)  # what else generate would put the start before
    first = torch.tensor([[*words, start]] * 2)
    options: list[dict[str, Any]] = [{}, {"num_beams": 2}, {"use_cache": False}]
    options += [{"cache_implementation": "static"}] if family != "whisper" else []
    expected = [model.generate(**inputs, decoder_input_ids=first, **SHORT, **o) for o in options]
    gt.attach(model, of_words(words, where="decoder"), name="words")
    for option, wanted in zip(options, expected, strict=True):
        got = model.generate(**inputs, **SHORT, **option)
        assert torch.equal(got[:, -5:], wanted[:, -5:])
        assert got.shape == (2, 6 if family != "whisper" else 5)


@pytest.mark.parametrize("family", FAMILIES_OF_TWO)
def test_each_step_is_the_whole_text_so_far(family: str) -> None:
    kind = FAMILIES[family]
    model: Any = kind.build()
    gt.attach(model, of_words(where="decoder"), name="words")
    inputs = {k: v for k, v in kind.inputs().items() if not k.startswith("decoder_")}
    said = model.generate(
        **inputs, **SHORT, output_logits=True, return_dict_in_generate=True, num_beams=1
    )
    ids = said.sequences[:, :-1]
    again = logits(model, {**inputs, "decoder_input_ids": ids})[:, -len(said.logits) :]
    assert close(torch.stack(said.logits, 1), again)


@pytest.mark.parametrize("where", ["decoder", "both"])
@pytest.mark.parametrize("method", PROMPTS)
def test_trains_counts_saves_and_starts_another(method: str, where: str, tmp_path: Path) -> None:
    model, inputs = FAMILIES["t5"].build(), batch("t5")
    settings = PROMPTS[method](length=3, where=where)
    adapter = gt.attach(model, settings, name="a", seed=1)
    single = PROMPTS[method](length=3).count(model, gt.anatomy(model))
    trained = sum(tensor.numel() for tensor in adapter.parameters())
    assert adapter.count() == trained == single * (2 if where == "both" else 1)
    labels = torch.full((2, 7), 9)
    model(input_ids=inputs["input_ids"], labels=labels).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapter.parameters())
    shake(adapter, 1, 0.5)
    expected = logits(model, inputs)
    again = FAMILIES["t5"].build()
    gt.load(again, adapter.save(tmp_path / "a"))
    assert torch.equal(logits(again, inputs), expected)
    adapter.finish()
    assert close(logits(model, inputs), expected)
    target = gt.attach(model, gt.PromptTuning(length=3, where=where), name="target", seed=2)
    target.start_from(adapter)
    gt.activate(model, "target")
    assert close(logits(model, inputs), expected)


def test_the_tasks_of_rows_reach_both_stacks() -> None:
    model, inputs = FAMILIES["t5"].build(), batch("t5")
    adapter = gt.attach(
        model, gt.MultitaskPromptTuning(length=3, tasks=2, where="both"), name="a", seed=1
    )
    shake(adapter, 1, 0.5)
    mixed = logits(model, {**inputs, "task_ids": torch.tensor([1, 0])})
    for row, task in enumerate((1, 0)):
        with gt.using(model, "a", tasks=task):
            assert close(logits(model, inputs)[row], mixed[row])


@pytest.mark.parametrize("family", ["t5", "whisper"])
def test_rows_with_prompts_of_any_length_are_each_row_alone(family: str) -> None:
    model, inputs = FAMILIES[family].build(), FAMILIES[family].inputs(batch=3)
    gt.attach(model, of_words(where="decoder"), name="long")
    gt.attach(model, of_words((31,), where="decoder"), name="short")
    with gt.using(model, gt.Rows(["short", None, "long"])):
        mixed = logits(model, inputs)
    for row, member in enumerate(("short", None, "long")):
        with gt.using(model, member):
            one = {name: value[row : row + 1] for name, value in inputs.items()}
            assert close(logits(model, one), mixed[row : row + 1])


def test_rows_of_one_length_in_each_stack_where_positions_are_counted() -> None:
    model = FAMILIES["bart"].build()
    gt.attach(model, of_words(), name="encoder")
    gt.attach(model, of_words(where="decoder"), name="decoder")
    gt.activate(model, gt.Stack("encoder", "decoder"))
    with pytest.raises(AdapterError, match="prompts of one length"):
        gt.activate(model, gt.Rows(["encoder", "decoder"]))


def test_in_heads_that_read_the_decoder() -> None:
    model, inputs = FAMILIES["bart"].build("classification"), FAMILIES["bart"].inputs()
    inputs.pop("decoder_input_ids")
    base = logits(model, inputs)
    adapter = gt.attach(model, of_words(where="decoder", train_head=False), name="words")
    assert not close(logits(model, inputs), base)
    assert adapter.count() == 3 * 32


def test_what_can_not_be_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"for encoder-decoders and .* made of dec"):
        gt.attach(FAMILIES["llama"].build(), of_words(where="decoder"))
    with pytest.raises(SettingsError, match=r"where is .both., which is for encoder-decoders and"):
        gt.attach(FAMILIES["bert"].build(), of_words(where="both", enters="blocks"))
    with pytest.raises(SettingsError, match=r'its decoder can: where="decoder"'):
        gt.attach(FAMILIES["whisper"].build(), of_words())
    with pytest.raises(SettingsError, match='Did you mean "decoder"'):
        gt.PromptTuning(where="decode")
    model = FAMILIES["t5"].build()
    one = gt.attach(model, of_words(), name="one")
    two = gt.attach(model, of_words(where="both"), name="two")
    with pytest.raises(AdapterError, match=r"has prompts in 2 of .* and its source in 1"):
        two.start_from(one)


def test_peft_has_none(tmp_path: Path) -> None:
    model = FAMILIES["t5"].build()
    adapter = gt.attach(model, of_words(position="front", where="both"), name="words")
    adapter.save(tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert "num_virtual_tokens" not in config
    assert config["where"] == "both"
