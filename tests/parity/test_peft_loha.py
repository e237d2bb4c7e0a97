"""HF PEFT loads our LoHa and we load its, where it isn't as LoHa and LoKr both are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import graftune as gt
from tests.parity.exchange import (
    LINEARS,
    Case,
    check_from_peft,
    check_to_peft,
    ids,
    peft,
)

FROM_PEFT: list[Case] = [
    ("llama", "ranks", {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.*_proj": 5}}),
    ("llama", "unused ranks", {"rank_pattern": {"q_proj": 2, "nothing": 3}}),
    ("llama", "expression", {"target_modules": r".*layers\.1\..*(q|k)_proj"}),
    ("vit", "core", {"target_modules": ["projection"], "use_effective_conv2d": True, "alpha": 5}),
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
    ("llama", "alpha", {"alpha": 3.0, "rank_dropout": 0.1, "module_dropout": 0.2}),
    ("llama", "ranks", {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 9.0}}),
    ("llama", "ranks, scale 1", {"rank_pattern": {"q_proj": 2, "layers.1.*v_proj": 1}}),
    ("llama", "one layer", {"layers": 1}),
    ("whisper", "1-D core", {"targets": ["conv1"], "tucker": True, "alpha": 50.0}),
]


@pytest.mark.parametrize(("family", "name", "settings"), TO_PEFT, ids=ids(TO_PEFT))
def test_what_we_write_peft_loads(
    family: str, name: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    check_to_peft(family, "default", gt.LoHa(**{"r": 4} | settings), tmp_path / "a")
