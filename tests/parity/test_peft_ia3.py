"""HF PEFT loads our (IA)³ and we load its: the same logits, every vector drawn anew."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import graftune as gt
from graftune.errors import BaseMismatchError, FormatError
from graftune.formats.peft_common import NO_RULES
from graftune.formats.peft_types import obstacle
from graftune.formats.peft_types.ia3 import _rules
from tests.parity.exchange import (
    Case,
    base,
    check_again,
    check_from_peft,
    check_own_form,
    check_to_peft,
    ids,
    peft,
    randomised,
    saved_by_peft,
)

FROM_PEFT: list[Case] = [
    ("bert", "default", {}),
    ("gpt2", "default, all of the fused projection", {}),
    ("llama", "default", {}),
    ("t5", "default", {}),
    ("mt5", "default, no input", {}),
    ("bloom", "default", {}),
    (
        "vit",
        "linears",
        {"target_modules": ["k_proj", "v_proj", "fc2"], "feedforward_modules": ["fc2"]},
    ),
    ("vit", "convolution", {"target_modules": ["projection", "fc2"], "feedforward_modules": []}),
    ("vit", "its input", {"target_modules": ["projection"], "feedforward_modules": ["projection"]}),
    (
        "llama",
        "expressions",
        {"target_modules": r".*layers\.1\..*(k|down)_proj", "feedforward_modules": r".*down_proj"},
    ),
    (
        "llama",
        "without",
        {
            "target_modules": ["k_proj", "down_proj"],
            "feedforward_modules": ["down_proj"],
            "exclude_modules": r".*\.0\..*",
        },
    ),
    ("llama", "head", {"modules_to_save": ["lm_head"]}),
    (
        "llama",
        "an end without a dot",
        {"target_modules": ".*(k|down)_proj", "feedforward_modules": ["n_proj"]},
    ),
]
TO_PEFT: list[Case] = [
    ("bert", "default", {}),
    ("gpt2", "slices", {}),
    ("gpt2", "the whole projection", {"targets": "c_attn"}),
    ("llama", "default", {}),
    ("llama", "one layer", {"layers": 1}),
    ("llama", "outputs", {"feedforward": ()}),
    ("llama", "inputs", {"targets": ()}),
    ("llama", "head", {"train_head": ["lm_head"]}),
    ("t5", "default", {}),
    ("vit", "default", {}),
    ("vit", "convolution", {"targets": "projection"}),
    ("vit", "its input", {"targets": (), "feedforward": "projection"}),
    ("phi3", "slices", {}),
    ("gpt_neox", "interleaved slices", {}),
    ("bloom", "interleaved slices", {}),
    ("bart", "default", {}),
    ("opt", "default", {}),
]  # fmt: skip


@pytest.mark.parametrize(("family", "name", "settings"), FROM_PEFT, ids=ids(FROM_PEFT))
def test_what_peft_writes_we_load(
    family: str, name: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    adapter = check_from_peft(family, "default", peft.IA3Config(**settings), tmp_path / "a")
    assert isinstance(adapter.method, gt.IA3)
    adapter.save(tmp_path / "b")
    check_again(adapter, family, "default", tmp_path / "b")


@pytest.mark.parametrize(("family", "name", "settings"), TO_PEFT, ids=ids(TO_PEFT))
def test_what_we_write_peft_loads(
    family: str, name: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    check_to_peft(family, "default", gt.IA3(**settings), tmp_path / "a")


@pytest.mark.parametrize("family", ["bert", "llama", "vit"])
def test_a_classifier_goes_both_ways_with_its_head(family: str, tmp_path: Path) -> None:
    check_to_peft(family, "classification", gt.IA3(), tmp_path / "a")
    kinds = {"vit": None, "bert": "SEQ_CLS", "llama": "SEQ_CLS"}
    settings: dict[str, Any] = {"task_type": kinds[family]}
    if family == "vit":
        settings |= {"target_modules": ["k_proj"], "feedforward_modules": []}
        settings["modules_to_save"] = ["classifier"]
    config = peft.IA3Config(**settings)
    assert check_from_peft(family, "classification", config, tmp_path / "b").head_names


def test_a_slice_is_written_as_a_whole_vector_with_ones_elsewhere(tmp_path: Path) -> None:
    model = base("gpt2", "default")
    adapter = gt.attach(model, gt.IA3())
    randomised(model)
    adapter.save(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    whole = tensors["base_model.model.transformer.h.0.attn.c_attn.ia3_l"]
    assert whole.shape == (96, 1)
    assert (whole[:32] == 1).all()  # the queries
    assert (whole[32:] != 1).all()
    down = tensors["base_model.model.transformer.h.0.mlp.c_proj.ia3_l"]
    assert down.shape[0] == 1
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["attn.c_attn", "mlp.c_proj"]
    assert config["feedforward_modules"] == ["mlp.c_proj"]
    assert config["fan_in_fan_out"]


@pytest.mark.parametrize(
    ("family", "settings", "words"),
    [
        ("mixtral", {}, "of experts"),
        ("bert", {"targets": "word_embeddings"}, "of class Embedding"),
        ("llama", {"targets": "down"}, "both the input and the output"),
    ],
)
def test_what_peft_cannot_compute_keeps_our_own_form(
    family: str, settings: dict[str, Any], words: str, tmp_path: Path
) -> None:
    adapter = check_own_form(family, gt.IA3(**settings), tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] != "IA3"
    assert words in obstacle(adapter)


def edited(path: Path, **changes: Any) -> Path:
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return path


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"feedforward_modules": None}, FormatError, "feedforward_modules is missing"),
        ({"feedforward_modules": ["k_proj"]}, BaseMismatchError, "another shape"),
        ({"target_modules": ["nothing"]}, FormatError, "name no module"),
        ({"use_dora": True}, FormatError, '"use_dora"'),
    ],
)
def test_a_config_that_fits_no_tensors_is_refused(
    changes: dict[str, Any], kind: type[Exception], words: str, tmp_path: Path
) -> None:
    saved_by_peft("llama", "default", peft.IA3Config(), tmp_path)
    with pytest.raises(kind, match=words):
        gt.load(base("llama", "default"), edited(tmp_path, **changes))


def test_names_grow_until_they_mean_no_other_module() -> None:
    known = ["a.output", "b.output", "b.key", "c.xkey"]
    found = _rules(["b.key"], ["b.output"], NO_RULES, known)
    assert found == {
        "target_modules": ["b.key", "b.output"],
        "feedforward_modules": ["b.output"],
    }
    clash = _rules(["x.a.k"], ["a.k"], NO_RULES, ["x.a.k", "a.k"])
    assert clash == {"target_modules": r"a\.k|x\.a\.k", "feedforward_modules": r"a\.k"}
