"""HF PEFT loads our VeRA and we load its: the same logits, both vectors drawn anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import graftune as gt
from graftune.errors import FormatError
from graftune.formats.peft_types import obstacle
from graftune.methods.vera import draw
from tests.families import FAMILIES
from tests.parity.exchange import (
    LINEARS,
    Case,
    base,
    check_from_peft,
    check_own_form,
    check_to_peft,
    ids,
    logits,
    peft,
)

SEEDED = {"save_projection": False, "projection_prng_key": 5}
FROM_PEFT: list[Case] = [
    *((family, "plain", {}) for family in LINEARS),
    *((family, "seeded", SEEDED) for family in LINEARS),
    ("llama", "other start", {"d_initial": 0.3, "vera_dropout": 0.1}),
    ("llama", "some layers", {"layers_to_transform": [1]} | SEEDED),
    ("llama", "expression", {"target_modules": r".*layers\.1\..*(q|k)_proj"}),
    ("llama", "narrow ones alone", {"target_modules": ["k_proj", "v_proj"]} | SEEDED),
    ("llama", "all linears", {"target_modules": "all-linear"}),
    ("llama", "head", {"modules_to_save": ["lm_head"]}),
]


@pytest.mark.parametrize(("family", "name", "settings"), FROM_PEFT, ids=ids(FROM_PEFT))
@pytest.mark.filterwarnings("ignore:Specified to not save")
def test_what_peft_writes_we_load(
    family: str, name: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    given = {"r": 12, "target_modules": LINEARS.get(family)} | settings
    adapter = check_from_peft(family, "default", peft.VeraConfig(**given), tmp_path / "a")
    file = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert ("base_model.vera_A" in file) == settings.get("save_projection", True)
    assert ("vera_A" in adapter.state_dict()) == settings.get("save_projection", True)


TO_PEFT: list[Case] = [
    *((family, "plain", {}) for family in LINEARS),
    *((family, "seeded", {"save_projection": False}) for family in LINEARS),
    ("llama", "another seed", {"save_projection": False, "projection_seed": 9}),
    ("llama", "dropout", {"dropout": 0.1, "d_initial": 0.3}),
    ("llama", "narrow ones alone", {"targets": ["k_proj", "v_proj"], "save_projection": False}),
    ("llama", "head", {"train_head": ["lm_head"]}),
]


@pytest.mark.parametrize(("family", "name", "settings"), TO_PEFT, ids=ids(TO_PEFT))
@pytest.mark.filterwarnings("ignore:Specified to not save")
def test_what_we_write_peft_loads(
    family: str, name: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    check_to_peft(family, "default", gt.VeRA(**{"r": 12} | settings), tmp_path / "a")


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_classifier_of_ours_is_loaded_by_peft_with_its_head(family: str, tmp_path: Path) -> None:
    check_to_peft(family, "classification", gt.VeRA(r=12), tmp_path / "a")


NOT_IN_PEFT = {
    "gpt2": ("parts of a fused module", {"targets": "qv"}),
    "mixtral": ("experts kept as one tensor", {}),
    "llama": ("embeddings", {"targets": "embeddings"}),
    "vit": ("convolutions", {"targets": ("projection",)}),
}


@pytest.mark.parametrize("family", NOT_IN_PEFT)
@pytest.mark.parametrize("saved", [False, True])
def test_what_peft_lacks_is_said_and_written_in_our_form(
    family: str, saved: bool, tmp_path: Path
) -> None:
    what, settings = NOT_IN_PEFT[family]
    method = gt.VeRA(r=12, save_projection=saved, **settings)
    adapter = check_own_form(family, method, tmp_path / "a")
    assert obstacle(adapter) == f"HF PEFT's VeRA doesn't act on {what}"


def test_projections_are_those_that_peft_draws() -> None:
    config = peft.VeraConfig(r=12, target_modules=LINEARS["llama"], projection_prng_key=3)
    theirs = peft.get_peft_model(base("llama", "default"), config).base_model
    A, B = draw(12, 80, 80, 3)
    assert torch.equal(theirs.vera_A["default"], A)
    assert torch.equal(theirs.vera_B["default"], B)


def test_stored_projections_count_even_where_the_seed_says_others(tmp_path: Path) -> None:
    model = FAMILIES["llama"].build()
    adapter = gt.attach(model, gt.VeRA(r=12))
    for tensor in adapter.parameters():
        torch.nn.init.normal_(tensor)
    adapter.save(tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.vera_A"] = 2 * tensors["base_model.vera_A"]
    save_file(tensors, file)
    again = FAMILIES["llama"].build()
    loaded = gt.load(again, tmp_path / "a")
    assert torch.equal(loaded.state_dict()["vera_A"], 2 * adapter.state_dict()["vera_A"])
    assert not torch.equal(logits(again, "llama", "default"), logits(model, "llama", "default"))


def test_trained_biases_are_refused_by_name(tmp_path: Path) -> None:
    config = peft.VeraConfig(r=12, target_modules=["query"], bias="all")
    peft.get_peft_model(base("bert", "default"), config).save_pretrained(tmp_path / "a")
    with pytest.raises(FormatError, match=r'setting "bias" \(\'all\'\).*not supported for VERA'):
        gt.load(base("bert", "default"), tmp_path / "a")
