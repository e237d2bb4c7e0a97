"""Unions read from AdapterHub's files and written: the sum of what each part is by itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import graftune as gt
from graftune.errors import FormatError
from graftune.formats.adapterhub.writing import save
from tests.contract.subjects import logits, shake
from tests.families import FAMILIES
from tests.formats.adapterhub.directories import BOTTLENECK, LORA, bottlenecks, write
from tests.formats.adapterhub.test_low_rank import lora_tensors
from tests.formats.adapterhub.test_prefix import PREFIX
from tests.formats.adapterhub.test_prefix import tensors as prefixes

PARTS: dict[str, Any] = {
    "prefix": (PREFIX, lambda: prefixes("bert")),
    "bottleneck": (BOTTLENECK, lambda: bottlenecks("bert", BOTTLENECK)),
    "lora": (LORA, lambda: lora_tensors("bert", LORA)),
}


def union(*names: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Returns the settings and tensors of some parts as one."""
    config = {"architecture": "union", "configs": [PARTS[name][0] for name in names]}
    return config, {key: t for name in names for key, t in PARTS[name][1]().items()}


def test_a_union_is_its_parts_stacked(tmp_path: Path) -> None:
    single = FAMILIES["bert"].build()
    for name, (config, tensors) in PARTS.items():
        gt.load(single, write(tmp_path / name, config, tensors(), "bert"), name=name)
    gt.activate(single, gt.Stack(*PARTS))
    model = FAMILIES["bert"].build()
    found = gt.load(model, write(tmp_path / "union", *union(*PARTS), "bert"), name="a")
    assert isinstance(found.method, gt.Union)
    assert [part.name for part in found.method.parts] == ["PrefixTuning", "PfeifferAdapter", "LoRA"]
    inputs = FAMILIES["bert"].inputs()
    torch.testing.assert_close(logits(model, inputs), logits(single, inputs), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "method",
    [
        gt.MAM(length=3, hidden=8, reduction=4, reads="residual"),
        gt.UniPELT(length=3, hidden=8, reduction=8, r=2, gate="mean-padded"),
        gt.Union(
            methods=(
                gt.PfeifferAdapter(reduction=8, gate="mean-padded"),
                gt.LoRA(r=2, alpha=4, targets="qv", gate="mean-padded"),
            )
        ),
    ],
    ids=["mam", "unipelt", "gated"],
)
@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "vit"])
def test_it_comes_back_as_the_same_function(family: str, method: Any, tmp_path: Path) -> None:
    model = FAMILIES[family].build()
    shake(gt.attach(model, method, name="a", seed=0), 1)
    path = save(gt.adapters(model)["a"], tmp_path / "a")
    config = json.loads((path / "adapter_config.json").read_text())["config"]
    assert config["architecture"] == "union"
    assert len(config["configs"]) == len(method.parts)
    again, inputs = FAMILIES[family].build(), FAMILIES[family].inputs()
    gt.load(again, path, name="a")
    torch.testing.assert_close(logits(again, inputs), logits(model, inputs), atol=1e-5, rtol=1e-5)


def test_a_part_that_cant_be_written_refuses_the_whole(tmp_path: Path) -> None:
    model = FAMILIES["bert"].build()
    adapter = gt.attach(
        model, gt.Union(methods=(gt.LoRA(targets="qv"), gt.LoHa(targets="ffn"))), "a"
    )
    with pytest.raises(FormatError, match="LoHa can't be written so"):
        save(adapter, tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("configs", "words"),
    [
        ([], "union of nothing"),
        ([LORA, LORA], "union of LoRA, LoRA, of which the tensors can't be told apart"),
        ([{"architecture": "mtl_lora"}, LORA], 'is of kind "mtl_lora"'),
        ([LORA | {"r_max": 3}], 'setting "r_max"'),
    ],
)
def test_unions_that_cant_be_read_are_refused(
    configs: list[Any], words: str, tmp_path: Path
) -> None:
    config = {"architecture": "union", "configs": configs}
    path = write(tmp_path / "a", config, lora_tensors("bert", LORA), "bert")
    model = FAMILIES["bert"].build()
    with pytest.raises(FormatError, match=words):
        gt.load(model, path, name="a")
    assert gt.adapters(model) == {}


def test_tensors_of_no_part_are_refused(tmp_path: Path) -> None:
    config, tensors = union("prefix", "lora")
    tensors |= bottlenecks("bert", BOTTLENECK)
    path = write(tmp_path / "a", config, tensors, "bert")
    with pytest.raises(FormatError, match="unexpected"):
        gt.load(FAMILIES["bert"].build(), path, name="a")
