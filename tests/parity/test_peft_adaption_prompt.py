"""HF PEFT loads our LLaMA-Adapters and we load its, on LLaMA and Mistral: the same logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import graftune as gt
from graftune.errors import FormatError
from graftune.formats.peft_types import obstacle
from tests.families import FAMILIES
from tests.parity.exchange import (
    base,
    check_again,
    check_from_peft,
    check_own_form,
    check_to_peft,
    peft,
    randomised,
    saved_by_peft,
)

MODELS = ["llama", "mistral"]


def config(**settings: Any) -> Any:
    given = {"adapter_len": 4, "adapter_layers": 2, "task_type": "CAUSAL_LM"} | settings
    return peft.AdaptionPromptConfig(**given)


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("layers", [1, 2])
def test_what_peft_writes_we_load(family: str, layers: int, tmp_path: Path) -> None:
    adapter = check_from_peft(family, "default", config(adapter_layers=layers), tmp_path / "a")
    assert len(adapter.grafts) == layers
    assert adapter.grafts[-1].place.module == "model.layers.1.self_attn"


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("layers", [None, "-1:"])
def test_what_we_write_peft_loads(family: str, layers: str | None, tmp_path: Path) -> None:
    method = gt.LLaMAAdapter(length=4, gate="layer", layers=layers)
    check_to_peft(family, "default", method, tmp_path / "a")


def test_both_generate_the_same(tmp_path: Path) -> None:
    wrapped = peft.get_peft_model(base("llama", "default"), config())
    randomised(wrapped)
    wrapped.save_pretrained(tmp_path / "a")
    model = base("llama", "default")
    gt.load(model, tmp_path / "a")
    inputs = FAMILIES["llama"].inputs(padding="left")
    inputs.pop("position_ids")
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    theirs, ours = (m.eval().generate(**inputs, **settings) for m in (wrapped, model))
    assert torch.equal(theirs, ours)


NOT_IN_PEFT: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "gates by head": ("llama", "default", {"gate": "head"}, "one gate for each attention"),
    "the lower block": ("llama", "default", {"layers": 0}, "in the topmost blocks"),
    "another model": ("qwen2", "default", {}, "on llama and mistral alone, this is qwen2"),
    "GPT-2": ("gpt2", "default", {}, "on llama and mistral alone, this is gpt2"),
    "a head": ("llama", "classification", {"train_head": True}, "keeps no heads"),
}


@pytest.mark.parametrize("name", NOT_IN_PEFT)
def test_what_peft_lacks_is_said_and_written_in_our_form(name: str, tmp_path: Path) -> None:
    family, task, settings, told = NOT_IN_PEFT[name]
    method = gt.LLaMAAdapter(**{"length": 4, "gate": "layer"} | settings)
    adapter = check_own_form(family, method, tmp_path / "a", task)
    assert told in obstacle(adapter)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"attention_bias": True}, "add the bias of o_proj a second time"),
        ({"head_dim": 4}, "this model has 16 and 32"),
    ],
    ids=["biases", "narrow heads"],
)
def test_models_on_which_peft_computes_something_else_are_told(
    settings: dict[str, Any], told: str, tmp_path: Path
) -> None:
    model = FAMILIES["llama"].build(**settings)
    adapter = gt.attach(model, gt.LLaMAAdapter(length=4, gate="layer"))
    assert told in obstacle(adapter)
    saved_by_peft("llama", "default", config(), tmp_path / "a")
    with pytest.raises(FormatError, match=told):
        gt.load(FAMILIES["llama"].build(**settings), tmp_path / "a")


def test_peft_adds_the_output_projections_bias_once_too_often() -> None:
    """With the gate shut PEFT's adapter is no longer the base where that bias is not zero."""
    model = FAMILIES["llama"].build(attention_bias=True)
    inputs = FAMILIES["llama"].inputs()
    with torch.no_grad():
        plain = model(**inputs).logits
        assert not torch.allclose(
            peft.get_peft_model(model, config())(**inputs).logits, plain, atol=1e-3
        )


def test_gpt2s_files_are_refused(tmp_path: Path) -> None:
    peft.get_peft_model(base("gpt2", "default"), config()).save_pretrained(tmp_path / "a")
    with pytest.raises(FormatError, match="on llama and mistral alone, this is gpt2"):
        gt.load(base("gpt2", "default"), tmp_path / "a")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"adapter_len": 0}, r'"adapter_len" is 0; expected a number above 0'),
        ({"adapter_layers": 3}, r'"adapter_layers" is 3; expected 1 to 2'),
        ({"adapter_layers": None}, r'"adapter_layers" is None'),
        ({"target_modules": "mlp"}, "its target_modules is 'mlp', expected \"self_attn\""),
    ],
)
def test_settings_that_mean_nothing_are_refused(
    settings: dict[str, Any], told: str, tmp_path: Path
) -> None:
    saved_by_peft("llama", "default", config(), tmp_path / "a")
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    with pytest.raises(FormatError, match=told):
        gt.load(base("llama", "default"), tmp_path / "a")


def test_a_classifier_with_its_head_left_alone_is_carried(tmp_path: Path) -> None:
    model = base("llama", "classification")
    method = gt.LLaMAAdapter(length=4, gate="layer", train_head=False)
    adapter = gt.attach(model, method)
    randomised(model)
    adapter.save(tmp_path / "a")
    assert obstacle(adapter) == ""
    check_again(adapter, "llama", "classification", tmp_path / "a")
