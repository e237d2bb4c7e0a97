"""HF PEFT loads our LayerNorm tuning, we load PEFT's: the same logits, whatever it names."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import graftune as gt
from graftune.errors import FormatError
from tests.parity.test_peft_lora import base, check_close, logits, randomised

peft = pytest.importorskip("peft", reason="parity is judged against HF PEFT itself")

Case = tuple[str, str, dict[str, Any]]
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


def saved_by_peft(family: str, task: str, settings: dict[str, Any], path: Path) -> torch.Tensor:
    """Writes a randomised adapter of PEFT's and returns its logits."""
    given = {"target_modules": NORMS.get(family)} | settings
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(base(family, task), peft.LNTuningConfig(**given))
        randomised(wrapped)
        wrapped.save_pretrained(path)
    return logits(wrapped, family, task)


@pytest.mark.parametrize(("family", "task", "settings"), FROM_PEFT)
def test_what_peft_writes_we_load(
    family: str, task: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    theirs = saved_by_peft(family, task, settings, tmp_path / "a")
    model = base(family, task)
    plain = logits(model, family, task)
    adapter = gt.load(model, tmp_path / "a")
    assert isinstance(adapter.method, gt.LayerNormTuning)
    check_close(logits(model, family, task), theirs, plain)
    adapter.save(tmp_path / "b")
    again = base(family, task)
    gt.load(again, tmp_path / "b")
    assert torch.equal(logits(again, family, task), logits(model, family, task))
    gt.activate(model, None)
    assert torch.equal(logits(model, family, task), plain)


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
    model = base(family, task)
    plain = logits(model, family, task)
    adapter = gt.attach(model, gt.LayerNormTuning(**settings))
    randomised(model)
    ours = logits(model, family, task)
    adapter.save(tmp_path / "a")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message="Found missing adapter keys")
        wrapped = peft.PeftModel.from_pretrained(base(family, task), tmp_path / "a")
    check_close(ours, logits(wrapped, family, task), plain)
    again = base(family, task)
    loaded = gt.load(again, tmp_path / "a", name="again")
    assert torch.equal(logits(again, family, task), ours)
    assert loaded.state_dict().keys() == adapter.state_dict().keys()
    loads = gt.inspect(tmp_path / "a").verdicts[0]
    assert loads.reader == "peft"
    assert loads.loads


def test_a_tied_tensor_is_refused_since_pefts_copy_isnt_tied(tmp_path: Path) -> None:
    saved_by_peft("gpt2", "default", {"target_modules": ["wte"]}, tmp_path / "a")
    with pytest.raises(FormatError, match=r"wte\.weight and lm_head\.weight, which share one"):
        gt.load(base("gpt2", "default"), tmp_path / "a")


@pytest.mark.parametrize(("family", "targets"), [("gpt2", ["wte"]), ("vit", ["vit.embeddings"])])
def test_what_peft_cant_express_keeps_our_own_form(
    family: str, targets: list[str], tmp_path: Path
) -> None:
    model = base(family, "default")
    adapter = gt.attach(model, gt.LayerNormTuning(targets=targets))
    randomised(model)
    adapter.save(tmp_path / "a")
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert config["peft_type"] == "LAYERNORMTUNING"
    again = base(family, "default")
    gt.load(again, tmp_path / "a")
    assert torch.equal(logits(again, family, "default"), logits(model, family, "default"))


def test_a_file_with_tensors_of_other_modules_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    saved_by_peft("llama", "default", {}, tmp_path / "a")
    file = tmp_path / "a/adapter_model.safetensors"
    tensors = load_file(file)
    strange = "base_model.model.model.layers.0.mlp.up_proj.ln_tuning_layers.weight"
    save_file(tensors | {strange: torch.zeros(80, 32)}, file)
    with pytest.raises(FormatError, match=r"1 unexpected: .*up_proj\.weight"):
        gt.load(base("llama", "default"), tmp_path / "a")
