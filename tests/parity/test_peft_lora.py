"""HF PEFT loads what we write, we load what PEFT writes: the same logits, for every LoRA there is.

Each variant's tensors are drawn anew after attaching, so that none is zero, in our model and in
PEFT's, and the two libraries' logits are compared on one base.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import graftune as gt
from tests.parity.exchange import (
    LINEARS,
    Case,
    base,
    check_close,
    check_from_peft,
    check_to_peft,
    ids,
    logits,
    peft,
    randomised,
    saved_by_peft,
)

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "alpha": {"lora_alpha": 3},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "random": {"init_lora_weights": False},
    "bias all": {"bias": "all"},
    "bias of its own": {"bias": "lora_only"},
    "lora bias": {"lora_bias": True},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "dora rslora": {"use_dora": True, "use_rslora": True, "lora_alpha": 7},
}
FROM_PEFT: list[Case] = [
    *(
        (family, name, settings)
        for family in LINEARS
        for name, settings in VARIANTS.items()
        if (family, name) != ("gpt2", "olora")  # PEFT's own start is of the wrong shape there
    ),
    ("llama", "ranks", {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.*_proj": 5}}),
    ("llama", "unused ranks", {"rank_pattern": {"q_proj": 2, "nothing": 3}}),
    ("llama", "some layers", {"layers_to_transform": [1]}),
    ("llama", "layers named", {"layers_to_transform": 0, "layers_pattern": "layers"}),
    ("gpt2", "without", {"exclude_modules": ["mlp.c_proj"]}),
    ("llama", "expression", {"target_modules": r".*layers\.1\..*(q|k)_proj"}),
    ("llama", "all linears", {"target_modules": "all-linear"}),
    ("bert", "all linears", {"target_modules": "all-linear"}),
    ("t5", "all linears", {"target_modules": "all-linear"}),
    ("llama", "embedding", {"target_modules": ["embed_tokens", "q_proj"]}),
    ("llama", "embedding and head", {"target_modules": ["embed_tokens", "lm_head"]}),
    ("gpt2", "embedding", {"target_modules": ["wte", "wpe"]}),
    ("gemma2", "embedding", {"target_modules": ["embed_tokens", "q_proj"]}),
    ("bert", "embedding dora", {"target_modules": ["word_embeddings"], "use_dora": True}),
    ("vit", "convolution", {"target_modules": ["projection", "q_proj"]}),
    ("vit", "convolution dora", {"target_modules": ["projection"], "use_dora": True}),
    ("llama", "head", {"modules_to_save": ["lm_head"]}),
    ("llama", "norm and embedding", {"modules_to_save": ["embed_tokens", "norm"]}),
    ("llama", "tokens", {"trainable_token_indices": [7, 20, 6]}),
    ("llama", "tokens by module", {"trainable_token_indices": {"embed_tokens": [6, 50]}}),
    ("gpt2", "tokens, tied", {"trainable_token_indices": [7, 20, 6]}),
    ("t5", "tokens, tied", {"trainable_token_indices": [7, 20, 6]}),
    ("gpt2", "head, tied", {"modules_to_save": ["lm_head"]}),
    ("gpt2", "embedding, tied", {"modules_to_save": ["wte"]}),
    ("t5", "embedding, tied", {"target_modules": ["shared", "q"]}),
    ("gpt2", "both sides of a tie", {"target_modules": ["wte", "lm_head"]}),
    ("bert", "in the head", {"target_modules": ["query", "pooler.dense", "classifier"]}),
    ("mixtral", "a matrix as parameter", {"target_parameters": ["q_proj.weight"]}),
    ("opt", "bias all", {"bias": "all", "target_modules": ["q_proj", "fc1"]}),
    ("mixtral", "experts", {"target_parameters": ["gate_up_proj"], "target_modules": ["q_proj"]}),
    (
        "mixtral",
        "both tensors of experts",
        {
            "target_parameters": ["experts.down_proj", "experts.gate_up_proj"],
            "target_modules": [],
            "rank_pattern": {"experts.down_proj": 2},
        },
    ),
]


def peft_config(family: str, settings: dict[str, Any]) -> Any:
    return peft.LoraConfig(**{"r": 4, "target_modules": LINEARS.get(family)} | settings)


@pytest.mark.parametrize(("family", "name", "settings"), FROM_PEFT, ids=ids(FROM_PEFT))
def test_what_peft_writes_we_load(
    family: str, name: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    check_from_peft(family, "default", peft_config(family, settings), tmp_path / "a")


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5", "roberta", "vit"])
def test_a_classifier_of_peft_is_loaded_with_its_head(family: str, tmp_path: Path) -> None:
    settings = {"task_type": None if family == "vit" else "SEQ_CLS", "bias": "all"}
    if family == "vit":
        settings["modules_to_save"] = ["classifier"]
    if family == "t5":
        settings["modules_to_save"] = ["classification_head"]
    settings["target_modules"] = LINEARS.get(family, ["query", "value"])
    config = peft_config(family, settings)
    assert check_from_peft(family, "classification", config, tmp_path / "a").head_names


TO_PEFT: list[Case] = [
    *(
        (family, name, settings)
        for family in ("bert", "gpt2", "llama", "t5", "vit")
        for name, settings in {
            "plain": {},
            "alpha": {"alpha": 3.0},
            "rslora": {"rslora": True, "alpha": 5.0},
            "dora": {"dora": True},
            "bias all": {"bias": "all"} if family not in ("llama", "t5") else {"dropout": 0.1},
            "bias of its own": {"bias": "lora_only"},
            "lora bias": {"lora_bias": True},
            "pissa": {"init": "pissa"},
            "olora": {"init": "olora", "rslora": True, "alpha": 3.0},
            "query and value": {"targets": "qv"},
            "query and value, dora": {"targets": "qv", "dora": True},
        }.items()
    ),
    ("llama", "ranks", {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 9.0}}),
    ("llama", "ranks, scale 1", {"rank_pattern": {"q_proj": 2, "layers.1.*v_proj": 1}}),
    ("llama", "one layer", {"layers": 1}),
    ("llama", "embedding", {"targets": ["embed_tokens", "q_proj"]}),
    ("gpt2", "embedding", {"targets": ["wte", "wpe"]}),
    ("gemma2", "embedding", {"targets": ["embed_tokens", "q_proj"]}),
    ("bert", "embedding dora", {"targets": ["word_embeddings"], "dora": True}),
    ("vit", "convolution", {"targets": ["projection", "q_proj"]}),
    ("vit", "convolution dora", {"targets": ["projection"], "dora": True}),
    ("llama", "tokens", {"trainable_tokens": [7, 20, 6]}),
    ("llama", "tokens by module", {"trainable_tokens": {"embed_tokens": [6, 50]}}),
    ("gpt2", "tokens, tied", {"trainable_tokens": [7, 20, 6]}),
    ("llama", "head", {"train_head": ["lm_head"]}),
    ("gpt2", "head, tied", {"train_head": ["lm_head"], "targets": "attention"}),
    ("mixtral", "experts", {}),
    ("mixtral", "experts alone", {"targets": "ffn"}),
    ("mixtral", "half of the fused experts", {"targets": ["up", "query"]}),
    ("phi3", "slices", {"targets": "qv"}),
    ("phi3", "slices, pissa", {"targets": ["query", "key", "up"], "init": "pissa"}),
    ("gpt_neox", "interleaved slices", {"targets": "qv", "bias": "lora_only"}),
    ("bloom", "interleaved slices, dora", {"targets": ["value", "down"], "dora": True}),
    ("opt", "bias all", {"bias": "all"}),
    ("gemma2", "plain", {}),
    ("bart", "plain", {}),
    ("whisper", "plain", {}),
]


@pytest.mark.parametrize(("family", "name", "settings"), TO_PEFT, ids=ids(TO_PEFT))
def test_what_we_write_peft_loads(
    family: str, name: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    check_to_peft(family, "default", gt.LoRA(**{"r": 4} | settings), tmp_path / "a")


@pytest.mark.parametrize(
    "family", ["bert", "gpt2", "llama", "t5", "roberta", "vit", "distilbert", "bart"]
)
def test_a_classifier_of_ours_is_loaded_by_peft_with_its_head(family: str, tmp_path: Path) -> None:
    bias = "none" if family in ("llama", "t5") else "all"
    check_to_peft(family, "classification", gt.LoRA(r=4, bias=bias), tmp_path / "a")


def test_peft_converts_pissa_and_we_load_the_ordinary_lora(tmp_path: Path) -> None:
    settings = {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": "pissa"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(base("llama", "default"), peft.LoraConfig(**settings))
        wrapped.peft_config["default"].init_lora_weights = True
        wrapped.save_pretrained(tmp_path / "start")
        wrapped.peft_config["default"].init_lora_weights = "pissa"
        randomised(wrapped)
        theirs = logits(wrapped, "llama", "default")
        wrapped.save_pretrained(
            tmp_path / "a", path_initial_model_for_weight_conversion=str(tmp_path / "start")
        )
    model = base("llama", "default")
    plain = logits(model, "llama", "default")
    adapter = gt.load(model, tmp_path / "a")
    assert adapter.method.r == 8
    check_close(logits(model, "llama", "default"), theirs, plain)


def test_what_peft_wrote_can_be_saved_and_loaded_again(tmp_path: Path) -> None:
    settings = {"modules_to_save": ["lm_head"], "trainable_token_indices": [5, 6], "use_dora": True}
    theirs = saved_by_peft("llama", "default", peft_config("llama", settings), tmp_path / "a")
    model = base("llama", "default")
    plain = logits(model, "llama", "default")
    gt.load(model, tmp_path / "a").save(tmp_path / "b")
    again = base("llama", "default")
    gt.load(again, tmp_path / "b")
    check_close(logits(again, "llama", "default"), theirs, plain)
    assert torch.equal(logits(again, "llama", "default"), logits(model, "llama", "default"))
