"""What HF PEFT and we exchange alike of LoHa and LoKr; what each has of its own is beside this."""

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

RANKS = {gt.LoHa: 4, gt.LoKr: 2}
both = pytest.mark.parametrize("make", RANKS)

FAMILIES_OF_PEFT = ("bert", "llama", "t5", "vit")
FROM_PEFT: list[Case] = [
    *((family, "plain", {}) for family in FAMILIES_OF_PEFT),
    ("llama", "alpha", {"alpha": 3}),
    ("llama", "random", {"init_weights": False}),
    ("llama", "some layers", {"layers_to_transform": [1]}),
    ("llama", "all linears", {"target_modules": "all-linear"}),
    ("llama", "head", {"modules_to_save": ["lm_head"]}),
    ("vit", "convolution", {"target_modules": ["projection", "q_proj"]}),
    ("whisper", "1-D", {"target_modules": ["conv1", "conv2"]}),
]


@both
@pytest.mark.parametrize(("family", "name", "settings"), FROM_PEFT, ids=ids(FROM_PEFT))
def test_what_peft_writes_we_load(
    make: Any, family: str, name: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    given = {"r": RANKS[make], "target_modules": LINEARS.get(family)} | settings
    config = getattr(peft, f"{make.name}Config")(**given)
    check_from_peft(family, "default", config, tmp_path / "a")


TO_PEFT: list[Case] = [
    *((family, "plain", {}) for family in FAMILIES_OF_PEFT),
    ("llama", "head", {"train_head": ["lm_head"]}),
    ("vit", "convolution", {"targets": ["projection", "q_proj"]}),
    ("vit", "core", {"targets": ["projection", "q_proj"], "tucker": True}),
    ("whisper", "1-D", {"targets": ["conv1"]}),
]


@both
@pytest.mark.parametrize(("family", "name", "settings"), TO_PEFT, ids=ids(TO_PEFT))
def test_what_we_write_peft_loads(
    make: Any, family: str, name: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    check_to_peft(family, "default", make(r=RANKS[make], **settings), tmp_path / "a")


@both
@pytest.mark.parametrize("family", ["bert", "vit"])
def test_a_classifier_of_ours_is_loaded_by_peft_with_its_head(
    make: Any, family: str, tmp_path: Path
) -> None:
    check_to_peft(family, "classification", make(r=RANKS[make]), tmp_path / "a")


NOT_IN_PEFT = {
    "gpt2": ("transformers' Conv1D", {}),
    "phi3": ("parts of a fused module", {"targets": "qv"}),
    "mixtral": ("experts kept as one tensor", {}),
    "llama": ("embeddings", {"targets": "embeddings"}),
}


@both
@pytest.mark.parametrize("family", NOT_IN_PEFT)
def test_what_peft_lacks_is_said_and_written_in_our_form(
    make: Any, family: str, tmp_path: Path
) -> None:
    what, settings = NOT_IN_PEFT[family]
    adapter = check_own_form(family, make(r=RANKS[make], **settings), tmp_path / "a")
    assert obstacle(adapter) == f"HF PEFT's {make.name} doesn't act on {what}"


@both
def test_a_setting_of_another_method_is_refused_by_name(make: Any, tmp_path: Path) -> None:
    gt.attach(FAMILIES["llama"].build(), make(r=4)).save(tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(path.read_text().replace('"r": 4', '"r": 4, "use_dora": true'))
    with pytest.raises(FormatError, match=r'setting "use_dora" \(True\)'):
        gt.load(FAMILIES["llama"].build(), tmp_path / "a")
