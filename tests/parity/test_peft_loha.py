"""HF PEFT loads our LoHa and we load its: the same logits, every factor drawn anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import graftune as gt
from graftune.errors import FormatError
from graftune.formats.peft_types import obstacle
from tests.families import FAMILIES
from tests.parity.exchange import (
    LINEARS,
    Case,
    check_from_peft,
    check_own_form,
    check_to_peft,
    ids,
    peft,
)

FAMILIES_OF_PEFT = ("bert", "llama", "t5", "vit")
FROM_PEFT: list[Case] = [
    *((family, "plain", {}) for family in FAMILIES_OF_PEFT),
    ("llama", "alpha", {"alpha": 3}),
    ("llama", "random", {"init_weights": False}),
    ("llama", "ranks", {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.*_proj": 5}}),
    ("llama", "unused ranks", {"rank_pattern": {"q_proj": 2, "nothing": 3}}),
    ("llama", "some layers", {"layers_to_transform": [1]}),
    ("llama", "expression", {"target_modules": r".*layers\.1\..*(q|k)_proj"}),
    ("llama", "all linears", {"target_modules": "all-linear"}),
    ("llama", "head", {"modules_to_save": ["lm_head"]}),
    ("vit", "convolution", {"target_modules": ["projection", "q_proj"]}),
    ("vit", "core", {"target_modules": ["projection"], "use_effective_conv2d": True, "alpha": 5}),
    ("whisper", "1-D", {"target_modules": ["conv1", "conv2"]}),
    (
        "whisper",
        "1-D core",
        {"target_modules": ["conv1"], "use_effective_conv2d": True, "alpha": 50},
    ),
]


@pytest.mark.parametrize(("family", "name", "settings"), FROM_PEFT, ids=ids(FROM_PEFT))
def test_what_peft_writes_we_load(
    family: str, name: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    given = {"r": 4, "target_modules": LINEARS.get(family)} | settings
    check_from_peft(family, "default", peft.LoHaConfig(**given), tmp_path / "a")


TO_PEFT: list[Case] = [
    *((family, "plain", {}) for family in FAMILIES_OF_PEFT),
    ("llama", "alpha", {"alpha": 3.0, "rank_dropout": 0.1, "module_dropout": 0.2}),
    ("llama", "ranks", {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 9.0}}),
    ("llama", "ranks, scale 1", {"rank_pattern": {"q_proj": 2, "layers.1.*v_proj": 1}}),
    ("llama", "one layer", {"layers": 1}),
    ("llama", "head", {"train_head": ["lm_head"]}),
    ("vit", "convolution", {"targets": ["projection", "q_proj"]}),
    ("vit", "core", {"targets": ["projection", "q_proj"], "tucker": True}),
    ("whisper", "1-D", {"targets": ["conv1"]}),
    ("whisper", "1-D core", {"targets": ["conv1"], "tucker": True, "alpha": 50.0}),
]


@pytest.mark.parametrize(("family", "name", "settings"), TO_PEFT, ids=ids(TO_PEFT))
def test_what_we_write_peft_loads(
    family: str, name: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    check_to_peft(family, "default", gt.LoHa(**{"r": 4} | settings), tmp_path / "a")


@pytest.mark.parametrize("family", ["bert", "vit"])
def test_a_classifier_of_ours_is_loaded_by_peft_with_its_head(family: str, tmp_path: Path) -> None:
    check_to_peft(family, "classification", gt.LoHa(r=4), tmp_path / "a")


NOT_IN_PEFT = {
    "gpt2": ("transformers' Conv1D", {}),
    "phi3": ("parts of a fused module", {"targets": "qv"}),
    "mixtral": ("experts kept as one tensor", {}),
    "llama": ("embeddings", {"targets": "embeddings"}),
}


@pytest.mark.parametrize("family", NOT_IN_PEFT)
def test_what_peft_lacks_is_said_and_written_in_our_form(family: str, tmp_path: Path) -> None:
    what, settings = NOT_IN_PEFT[family]
    adapter = check_own_form(family, gt.LoHa(r=4, **settings), tmp_path / "a")
    assert obstacle(adapter) == f"HF PEFT's LoHa doesn't act on {what}"


def test_a_setting_of_another_method_is_refused_by_name(tmp_path: Path) -> None:
    model = FAMILIES["llama"].build()
    gt.attach(model, gt.LoHa(r=4)).save(tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(path.read_text().replace('"r": 4', '"r": 4, "use_dora": true'))
    with pytest.raises(FormatError, match=r'setting "use_dora" \(True\)'):
        gt.load(FAMILIES["llama"].build(), tmp_path / "a")
