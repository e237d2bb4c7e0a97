"""HF PEFT loads our virtual tokens of P-tuning and we load its: without what made them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import graftune as gt
from graftune.formats.peft_types import obstacle
from tests.families import FAMILIES
from tests.parity.exchange import (
    base,
    check_again,
    check_close,
    check_from_peft,
    check_own_form,
    check_to_peft,
    logits,
    peft,
    randomised,
)

TASKS = {"decoder": "CAUSAL_LM", "encoder-decoder": "SEQ_2_SEQ_LM"}
FAMILIES_TRIED = ["gpt2", "opt", "bloom", "llama", "gemma2", "t5", "bart"]
LSTM = {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 8}


def config(family: str, **settings: Any) -> Any:
    given = {"num_virtual_tokens": 4, "task_type": TASKS.get(FAMILIES[family].kind)} | settings
    return peft.PromptEncoderConfig(**given)


@pytest.mark.parametrize("family", FAMILIES_TRIED)
@pytest.mark.parametrize("settings", [{}, LSTM], ids=["mlp", "lstm"])
def test_what_peft_writes_we_load(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    adapter = check_from_peft(family, "default", config(family, **settings), tmp_path / "a")
    assert adapter.method.encoder == "none"
    assert [len(tensor) for _, tensor in adapter.named_tensors()] == [4]


def test_a_decoders_classifier_of_peft_is_loaded_with_its_head(tmp_path: Path) -> None:
    given = config("llama", task_type="SEQ_CLS")
    adapter = check_from_peft("llama", "classification", given, tmp_path / "a")
    assert adapter.head_names == ("score",)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_an_encoders_classifier_is_loaded_with_its_head(family: str, tmp_path: Path) -> None:
    given = config(family, task_type="SEQ_CLS")
    adapter = check_from_peft(family, "classification", given, tmp_path / "a")
    assert adapter.method.stays


@pytest.mark.parametrize("family", FAMILIES_TRIED)
def test_what_we_write_peft_loads(family: str, tmp_path: Path) -> None:
    check_to_peft(family, "default", gt.PTuning(length=4, encoder="none"), tmp_path / "a")


@pytest.mark.parametrize("encoder", ["lstm", "mlp"])
def test_finished_ones_are_written_for_peft_and_unfinished_ones_in_our_form(
    encoder: str, tmp_path: Path
) -> None:
    model = base("llama", "default")
    plain = logits(model, "llama", "default")
    adapter = gt.attach(model, gt.PTuning(length=4, encoder=encoder))
    randomised(model)
    assert "keeps no encoder" in obstacle(adapter)
    adapter.save(tmp_path / "unfinished")
    assert not gt.inspect(tmp_path / "unfinished").verdicts[0].loads
    check_again(adapter, "llama", "default", tmp_path / "unfinished")
    adapter.finish()
    assert obstacle(adapter) == ""
    adapter.save(tmp_path / "finished")
    check_again(adapter, "llama", "default", tmp_path / "finished")
    file = load_file(tmp_path / "finished" / "adapter_model.safetensors")
    assert [*file] == ["prompt_embeddings"]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        wrapped = peft.PeftModel.from_pretrained(base("llama", "default"), tmp_path / "finished")
    ours = logits(model, "llama", "default")
    check_close(ours, logits(wrapped, "llama", "default"), plain)


def test_what_peft_lacks_is_said_and_written_in_our_form(tmp_path: Path) -> None:
    for name, (family, settings, told) in {
        "marker": ("llama", {"marker": 98}, "where its marker stands"),
        "after": ("bert", {}, "this one follows the first token"),
    }.items():
        model = base(family, "default")
        adapter = gt.attach(model, gt.PTuning(length=4, encoder="none", **settings))
        assert told in obstacle(adapter)
        adapter.save(tmp_path / name)
        again = gt.load(base(family, "default"), tmp_path / name)
        assert again.method == adapter.method
        assert torch.equal(next(again.parameters()), next(adapter.parameters()))
    check_own_form("llama", gt.PTuning(length=4), tmp_path / "unfinished")
