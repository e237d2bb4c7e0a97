"""Prompts read from AdapterHub's files and written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import graftune as gt
from graftune.errors import BaseMismatchError, FormatError
from graftune.formats.adapterhub.writing import save
from tests.contract.subjects import logits, shake
from tests.families import FAMILIES
from tests.formats.adapterhub.directories import WIDTH, write

PROMPT: dict[str, Any] = {
    "architecture": "prompt_tuning",
    "combine": "prefix",
    "init_weights_seed": None,
    "prompt_init": "random_uniform",
    "prompt_init_text": None,
    "prompt_length": 3,
}


def tensors(family: str, length: int = 3) -> dict[str, Tensor]:
    home = f"{family}.prompt_tuning.prompt_tunings.task"
    draw = torch.Generator().manual_seed(2)
    return {f"{home}.prompt_embedding.weight": torch.randn(length, WIDTH, generator=draw)}


@pytest.mark.parametrize("combine", ["prefix", "prefix_after_bos"])
@pytest.mark.parametrize("family", ["bert", "vit"])
def test_blocks_see_it_behind_the_embedding_layer(
    family: str, combine: str, tmp_path: Path
) -> None:
    given, at = tensors(family), int(combine == "prefix_after_bos")
    path = write(tmp_path / "a", PROMPT | {"combine": combine}, given, family)
    model: Any = FAMILIES[family].build()
    gt.load(model, path, name="a")
    inputs = FAMILIES[family].inputs()
    found = logits(model, inputs)
    plain: Any = FAMILIES[family].build()
    prompt = next(iter(given.values())).expand(2, -1, -1)
    plain.base_model.embeddings.register_forward_hook(
        lambda _, args, E: torch.cat([E[:, :at], prompt, E[:, at:]], 1)
    )
    if "attention_mask" in inputs:
        mask = inputs["attention_mask"]
        inputs = {**inputs, "attention_mask": torch.cat([mask.new_ones(2, 3), mask], 1)}
    torch.testing.assert_close(found, logits(plain, inputs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "settings", [{"stays": True, "position": "front"}, {"position": "after-first"}], ids=str
)
@pytest.mark.parametrize("family", ["bert", "roberta", "vit"])
def test_ours_come_back_as_the_same_function(
    family: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    model = FAMILIES[family].build()
    method = gt.PromptTuning(length=4, enters="blocks", **settings)
    shake(gt.attach(model, method, name="a", seed=0), 1)
    again = FAMILIES[family].build()
    gt.load(again, save(gt.adapters(model)["a"], tmp_path / "a"), name="a")
    inputs = FAMILIES[family].inputs()
    torch.testing.assert_close(logits(again, inputs), logits(model, inputs), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, r'behind the embedding layer, and this PromptTuning before it \(enters="blocks"\)'),
        ({"enters": "blocks", "position": "front"}, 'position="after-first" or stays=True'),
    ],
)
def test_what_adapterhub_cannot_compute_is_not_written(
    settings: dict[str, Any], words: str, tmp_path: Path
) -> None:
    adapter = gt.attach(FAMILIES["bert"].build(), gt.PromptTuning(length=2, **settings), "a")
    with pytest.raises(FormatError, match=words):
        save(adapter, tmp_path / "a")


@pytest.mark.parametrize(
    ("family", "config", "given", "kind", "words"),
    [
        ("bert", {"combine": "suffix"}, {}, FormatError, 'combine is "suffix", expected one of'),
        ("bert", {"prompt_length": 5}, {}, BaseMismatchError, r"\(3, 32\)"),
        ("bert", {}, {"bert.other": torch.ones(1)}, FormatError, "1 unexpected: .*other"),
        ("bert", {"temperature": 2}, {}, FormatError, 'setting "temperature"'),
    ],
)
def test_what_does_not_fit_is_refused(
    family: str, config: Any, given: Any, kind: Any, words: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "a", PROMPT | config, tensors(family) | given, family)
    model = FAMILIES[family].build()
    with pytest.raises(kind, match=words):
        gt.load(model, path, name="a")
    assert gt.adapters(model) == {}
