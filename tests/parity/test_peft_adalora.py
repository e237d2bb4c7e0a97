"""HF PEFT loads our AdaLoRA and we load its, pruned or not; and both prune alike in training."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import graftune as gt
from graftune.errors import FormatError
from graftune.formats.peft_types import obstacle
from graftune.methods.adalora import triplets_of
from tests.families import FAMILIES
from tests.parity.exchange import (
    LINEARS,
    Case,
    base,
    check_again,
    check_close,
    check_from_peft,
    check_own_form,
    check_to_peft,
    ids,
    logits,
    peft,
    randomised,
)

TOTAL = 10


def peft_config(family: str, **settings: Any) -> Any:
    given = {"init_r": 4, "target_r": 2, "total_step": TOTAL, "target_modules": LINEARS.get(family)}
    return peft.AdaLoraConfig(**given | settings)


FROM_PEFT: list[Case] = [
    *((family, "plain", {}) for family in LINEARS),
    *((family, "alpha", {"lora_alpha": 3}) for family in LINEARS),
    ("llama", "alpha of the rank", {"lora_alpha": 0}),
    ("llama", "target above the start", {"init_r": 4, "target_r": 8}),
    ("llama", "without effect", {"use_rslora": True, "alpha_pattern": {"q_proj": 3}}),
    ("llama", "some layers", {"layers_to_transform": [1]}),
    ("llama", "expression", {"target_modules": r".*layers\.1\..*(q|k)_proj"}),
    ("llama", "all linears", {"target_modules": "all-linear"}),
    ("llama", "head", {"modules_to_save": ["lm_head"]}),
    ("vit", "convolution", {"target_modules": ["projection", "q_proj"]}),
]


@pytest.mark.parametrize(("family", "name", "settings"), FROM_PEFT, ids=ids(FROM_PEFT))
def test_what_peft_writes_we_load(
    family: str, name: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    adapter = check_from_peft(family, "default", peft_config(family, **settings), tmp_path / "a")
    assert adapter.method.rank_pattern is None  # type: ignore[attr-defined]


@pytest.mark.parametrize("family", LINEARS)
def test_what_peft_pruned_we_load(family: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(base(family, "default"), peft_config(family, init_r=6))
        randomised(wrapped)
        allocator = wrapped.base_model.rankallocator
        for name, tensor in wrapped.base_model.model.named_parameters():
            if "lora_" in name:
                allocator.ipt[name] = allocator.exp_avg_ipt[name] = torch.rand_like(tensor)
                allocator.exp_avg_unc[name] = torch.ones_like(tensor)
                if name.endswith("lora_E.default") and "1" in name:  # some lose all
                    allocator.exp_avg_ipt[name] = -torch.rand_like(tensor)
        wrapped.base_model.update_and_allocate(TOTAL)
        wrapped.save_pretrained(tmp_path / "a")
    theirs, model = logits(wrapped, family, "default"), base(family, "default")
    plain = logits(model, family, "default")
    adapter = gt.load(model, tmp_path / "a")
    check_close(logits(model, family, "default"), theirs, plain)
    method: Any = adapter.method
    assert method.r == 6
    assert sum(method.rank_pattern.values()) == 2 * len(method.rank_pattern)
    assert 0 in method.rank_pattern.values()
    adapter.save(tmp_path / "b")
    check_again(adapter, family, "default", tmp_path / "b")


TO_PEFT: list[Case] = [
    *((family, "plain", {}) for family in LINEARS),
    *((family, "paper's scale", {"scale_form": "paper"}) for family in LINEARS),
    ("llama", "alpha", {"alpha": 3.0, "dropout": 0.1}),
    ("llama", "one layer", {"layers": 1}),
    ("llama", "head", {"train_head": ["lm_head"]}),
    ("vit", "convolution", {"targets": ("projection", "q_proj")}),
    ("bart", "plain", {}),
]


@pytest.mark.parametrize(("family", "name", "settings"), TO_PEFT, ids=ids(TO_PEFT))
def test_what_we_write_peft_loads(
    family: str, name: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    method = gt.AdaLoRA(**{"r": 4, "target_r": 2} | settings)
    check_to_peft(family, "default", method, tmp_path / "a")


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5", "vit"])
def test_a_classifier_of_ours_is_loaded_by_peft_with_its_head(family: str, tmp_path: Path) -> None:
    method = gt.AdaLoRA(r=4, target_r=2)
    check_to_peft(family, "classification", method, tmp_path / "a")


@pytest.mark.parametrize("family", LINEARS)
def test_what_we_pruned_peft_loads(family: str, tmp_path: Path) -> None:
    model = base(family, "default")
    plain = logits(model, family, "default")
    adapter = gt.attach(model, gt.AdaLoRA(r=6, target_r=2), seed=0)
    randomised(model)
    for index, one in enumerate(triplets_of(adapter)):
        one.get_buffer("sensitivity_Lambda").copy_(torch.rand(6) + (index % 3 > 0))
        one.get_buffer("uncertainty_Lambda").fill_(1.0)
    adapter.finish()
    ranks = adapter.method.rank_pattern  # type: ignore[attr-defined]
    assert 0 in ranks.values()
    adapter.save(tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert {k: sum(v) for k, v in config["rank_pattern"].items()} == {
        f"{name}.lora_E": rank for name, rank in ranks.items()
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message="Found missing adapter keys")
        wrapped = peft.PeftModel.from_pretrained(base(family, "default"), tmp_path / "a")
    check_close(logits(model, family, "default"), logits(wrapped, family, "default"), plain)
    check_again(adapter, family, "default", tmp_path / "a")


def test_both_prune_alike_and_by_the_same_penalty() -> None:
    """The one difference: we measure at the last pruning too, as the paper's algorithm does.

    PEFT adds the penalty only in models that it wraps for a task.
    """
    total, last, inputs = 14, 11, FAMILIES["llama"].inputs()
    schedule = {"tinit": 2, "tfinal": 3, "beta1": 0.8, "beta2": 0.7}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given = {"total_step": total, "deltaT": 2, "orth_reg_weight": 0.3, **schedule}
        config = peft_config("llama", task_type="CAUSAL_LM", **given)
        wrapped = peft.get_peft_model(base("llama", "default"), config)
    model = base("llama", "default")
    method = gt.AdaLoRA(r=4, target_r=2, alpha=8, delta_t=2, orthogonal=0.3, **schedule)
    adapter = gt.attach(model, method, seed=0)
    theirs = dict(wrapped.base_model.model.named_parameters())
    pairs = [
        (theirs[f"{name.rpartition('.')[0]}.{other}.default"], tensor, other)
        for name, tensor in adapter.named_parameters()
        for other in [{"P": "lora_B", "Lambda": "lora_E", "Q": "lora_A"}[name.rpartition(".")[2]]]
    ]
    with torch.no_grad():
        for their, our, _ in pairs:
            their.copy_(our.reshape(their.shape))
    optimizers = [
        torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.5)
        for m in (wrapped, model)
    ]
    adapter.begin(total)
    for step in range(1, total + 1):
        loss = wrapped(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        optimizers[0].step()
        if step == last:
            wrapped.base_model.rankallocator.update_ipt(wrapped.base_model.model)
        wrapped.base_model.update_and_allocate(step)
        our_loss = model(**inputs, labels=inputs["input_ids"]).loss + adapter.penalty()
        our_loss.backward()
        optimizers[1].step()
        adapter.advance(step)
        torch.testing.assert_close(our_loss, loss)
        for optimizer in optimizers:
            optimizer.zero_grad()
        for their, our, kind in pairs:
            torch.testing.assert_close(our.reshape(their.shape), their, atol=1e-5, rtol=1e-4)
            if kind == "lora_E":
                assert torch.equal(our == 0, their.flatten() == 0), step
    assert sum(int((one.Lambda != 0).sum()) for one in triplets_of(adapter)) == 2 * len(pairs) // 3


NOT_IN_PEFT = {
    "gpt2": ("parts of a fused module", {"targets": "qv"}),
    "mixtral": ("experts kept as one tensor", {}),
    "llama": ("embeddings", {"targets": "embeddings"}),
    "whisper": ("convolutions of two dimensions only", {"targets": ("conv1", "q_proj")}),
    "bert": ("an alpha of 0", {"alpha": 0.0}),
}


@pytest.mark.parametrize("family", NOT_IN_PEFT)
def test_what_peft_lacks_is_said_and_written_in_our_form(family: str, tmp_path: Path) -> None:
    words, settings = NOT_IN_PEFT[family]
    method = gt.AdaLoRA(**{"r": 4, "target_r": 2} | settings)
    adapter = check_own_form(family, method, tmp_path / "a")
    assert words in obstacle(adapter)
    adapter.finish()
    adapter.save(tmp_path / "b")
    check_again(adapter, family, "default", tmp_path / "b")


def test_what_is_not_supported_of_peft_is_named(tmp_path: Path) -> None:
    check_from_peft("llama", "default", peft_config("llama"), tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    written = json.loads(path.read_text())
    for setting, value in {"bias": "all", "use_dora": True, "target_parameters": ["x"]}.items():
        path.write_text(json.dumps({**written, setting: value}))
        with pytest.raises(FormatError, match=f'"{setting}".*not supported for ADALORA'):
            gt.load(base("llama", "default"), tmp_path / "a")
    path.write_text(json.dumps({**written, "rank_pattern": {"model.nothing.lora_E": [True] * 4}}))
    with pytest.raises(FormatError, match=r'rank_pattern names "model\.nothing"'):
        gt.load(base("llama", "default"), tmp_path / "a")


def test_a_files_tensors_are_named_and_shaped_as_pefts(tmp_path: Path) -> None:
    adapter = gt.attach(base("llama", "default"), gt.AdaLoRA(r=4, target_r=2, targets="query"))
    adapter.save(tmp_path / "a")
    file = load_file(tmp_path / "a" / "adapter_model.safetensors")
    shapes = {name.rpartition(".")[2]: tuple(tensor.shape) for name, tensor in file.items()}
    assert shapes == {"lora_A": (4, 32), "lora_B": (32, 4), "lora_E": (4, 1)}
