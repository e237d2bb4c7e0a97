"""HF PEFT loads our LayerNorm tuning, we load PEFT's: the same logits, whatever it names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import graftune as gt
from graftune.errors import FormatError
from tests.parity.exchange import (
    Case,
    base,
    check_again,
    check_from_peft,
    check_own_form,
    check_to_peft,
    peft,
    saved_by_peft,
)

NORMS = {
    "bert": ["LayerNorm"],
    "gpt2": ["ln_1", "ln_2", "ln_f"],
    "llama": ["input_layernorm", "post_attention_layernorm", "norm"],
    "t5": ["layer_norm", "final_layer_norm"],
    "vit": ["layernorm_before", "layernorm_after", "layernorm"],
}
FROM_PEFT: list[Case] = [
    *((family, "default", {}) for family in NORMS),
    ("bert", "classification", {"task_type": "SEQ_CLS"}),
    ("vit", "classification", {"modules_to_save": ["classifier"]}),
    ("llama", "default", {"exclude_modules": ["norm"]}),
    ("llama", "default", {"target_modules": r".*layers\.1\..*layernorm"}),
    ("llama", "default", {"modules_to_save": ["lm_head"]}),
    ("llama", "default", {"target_modules": ["q_proj", "norm"]}),
    ("bert", "default", {"target_modules": ["word_embeddings", "query", "output.LayerNorm"]}),
    ("bert", "default", {"target_modules": ["layer.1"]}),
    ("gpt2", "default", {"target_modules": ["c_attn", "wpe"]}),
    ("mixtral", "default", {"target_modules": ["experts", "norm"]}),
    ("vit", "default", {"target_modules": ["projection"]}),
]


def peft_config(family: str, settings: dict[str, Any]) -> Any:
    return peft.LNTuningConfig(**{"target_modules": NORMS.get(family)} | settings)


@pytest.mark.parametrize(("family", "task", "settings"), FROM_PEFT)
def test_what_peft_writes_we_load(
    family: str, task: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    adapter = check_from_peft(family, task, peft_config(family, settings), tmp_path / "a")
    assert isinstance(adapter.method, gt.LayerNormTuning)
    adapter.save(tmp_path / "b")
    check_again(adapter, family, task, tmp_path / "b")


TO_PEFT: list[Case] = [
    *((family, "default", {}) for family in NORMS),
    *((family, "classification", {}) for family in ("bert", "gpt2", "llama", "vit", "modernbert")),
    ("bert", "default", {"which": "bias"}),
    ("bert", "default", {"which": "weight", "layers": -1}),
    ("llama", "default", {"layers": [1], "train_head": ["lm_head"]}),
    ("gpt2", "default", {"targets": ["ln_f", "c_fc"]}),
    ("gemma2", "default", {}),
    ("bart", "default", {}),
    ("qwen3", "default", {}),
]


@pytest.mark.parametrize(("family", "task", "settings"), TO_PEFT)
def test_what_we_write_peft_loads(
    family: str, task: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    check_to_peft(family, task, gt.LayerNormTuning(**settings), tmp_path / "a")


def test_a_tied_tensor_is_refused_since_pefts_copy_isnt_tied(tmp_path: Path) -> None:
    config = peft_config("gpt2", {"target_modules": ["wte"]})
    saved_by_peft("gpt2", "default", config, tmp_path / "a")
    with pytest.raises(FormatError, match=r"wte\.weight and lm_head\.weight, which share one"):
        gt.load(base("gpt2", "default"), tmp_path / "a")


@pytest.mark.parametrize(("family", "targets"), [("gpt2", ["wte"]), ("vit", ["vit.embeddings"])])
def test_what_peft_cant_express_keeps_our_own_form(
    family: str, targets: list[str], tmp_path: Path
) -> None:
    check_own_form(family, gt.LayerNormTuning(targets=targets), tmp_path / "a")
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert config["peft_type"] == "LAYERNORMTUNING"


def test_a_file_with_tensors_of_other_modules_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    saved_by_peft("llama", "default", peft_config("llama", {}), tmp_path / "a")
    file = tmp_path / "a/adapter_model.safetensors"
    tensors = load_file(file)
    strange = "base_model.model.model.layers.0.mlp.up_proj.ln_tuning_layers.weight"
    save_file(tensors | {strange: torch.zeros(80, 32)}, file)
    with pytest.raises(FormatError, match=r"1 unexpected: .*up_proj\.weight"):
        gt.load(base("llama", "default"), tmp_path / "a")
