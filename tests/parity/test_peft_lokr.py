"""HF PEFT loads our LoKr and we load its, where it isn't as LoHa and LoKr both are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import graftune as gt
from graftune.errors import FormatError
from graftune.formats.peft_types import obstacle
from graftune.methods.lokr import divisors
from tests.parity.exchange import (
    LINEARS,
    Case,
    base,
    check_from_peft,
    check_own_form,
    check_to_peft,
    ids,
    peft,
)

CONVOLUTION = {"target_modules": ["projection", "q_proj"]}
CORE = {"use_effective_conv2d": True}
FROM_PEFT: list[Case] = [
    *((family, "both", {"decompose_both": True, "r": 1}) for family in ("bert", "llama")),
    *((family, "both whole", {"r": 8, "alpha": 3}) for family in ("bert", "llama")),
    ("llama", "lycoris", {"init_weights": "lycoris"}),
    ("llama", "lycoris, both", {"init_weights": "lycoris", "decompose_both": True, "r": 1}),
    ("llama", "factor", {"decompose_factor": 2}),
    ("llama", "factor above the root", {"decompose_factor": 8}),
    ("llama", "factor that divides nothing", {"decompose_factor": 7}),
    ("llama", "ranks", {"rank_pattern": {"q_proj": 1}, "alpha_pattern": {"layers.1.*_proj": 5}}),
    ("llama", "unused ranks", {"rank_pattern": {"q_proj": 1, "nothing": 3}}),
    ("vit", "convolution, whole", CONVOLUTION | {"r": 4}),
    ("vit", "core", CONVOLUTION | CORE),
    ("vit", "core, both", CONVOLUTION | CORE | {"decompose_both": True, "r": 1, "alpha": 3}),
    ("whisper", "1-D core", {"target_modules": ["conv1", "conv2"]} | CORE),
]


@pytest.mark.parametrize(("family", "name", "settings"), FROM_PEFT, ids=ids(FROM_PEFT))
def test_what_peft_writes_we_load(
    family: str, name: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    given = {"r": 2, "target_modules": LINEARS.get(family)} | settings
    check_from_peft(family, "default", peft.LoKrConfig(**given), tmp_path / "a")


TO_PEFT: list[Case] = [
    ("llama", "both", {"decompose_both": True, "r": 1}),
    ("llama", "alpha", {"alpha": 3.0, "rank_dropout": 0.1, "rank_dropout_scale": True}),
    ("llama", "both whole", {"r": 8, "alpha": 3.0}),
    ("llama", "both whole, as LyCORIS scales", {"r": 8, "alpha": 3.0, "scaling": "lycoris"}),
    ("llama", "some whole, as LyCORIS scales", {"r": 4, "alpha": 3.0, "scaling": "lycoris"}),
    ("llama", "lycoris", {"init": "lycoris"}),
    ("llama", "factor", {"decompose_factor": 2}),
    ("llama", "ranks", {"rank_pattern": {"q_proj": 1}, "alpha_pattern": {"up_proj": 9.0}}),
    ("llama", "ranks, scale 1", {"rank_pattern": {"q_proj": 1, "layers.1.*v_proj": 3}}),
    ("vit", "convolution, whole", {"targets": ["projection"], "r": 4}),
    ("whisper", "1-D core", {"targets": ["conv1"], "tucker": True}),
]


@pytest.mark.parametrize(("family", "name", "settings"), TO_PEFT, ids=ids(TO_PEFT))
def test_what_we_write_peft_loads(
    family: str, name: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    check_to_peft(family, "default", gt.LoKr(**{"r": 2} | settings), tmp_path / "a")


def test_whole_1d_kernels_are_ours_alone_since_peft_multiplies_them_otherwise(
    tmp_path: Path,
) -> None:
    method = gt.LoKr(r=4, targets=("conv1",))
    adapter = check_own_form("whisper", method, tmp_path / "a")
    why = "computes model.encoder.conv1, a 1-D convolution with W2 whole, otherwise"
    assert obstacle(adapter) == f"HF PEFT's LoKr {why}"
    config = peft.LoKrConfig(r=4, target_modules=["conv1"])
    peft.get_peft_model(base("whisper", "default"), config).save_pretrained(tmp_path / "b")
    with pytest.raises(FormatError, match=r"model\.encoder\.conv1 is a 1-D convolution with W2"):
        gt.load(base("whisper", "default"), tmp_path / "b")


def test_widths_are_cut_as_peft_cuts_them() -> None:
    from peft.tuners.lokr.layer import factorization

    for size in (*range(1, 200), 768, 3072, 4096, 11008, 50257):
        for factor in (-1, 1, 2, 3, 4, 7, 8, 16, 100):
            assert divisors(size, factor) == factorization(size, factor), (size, factor)
