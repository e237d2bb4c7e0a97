"""A base of which accelerate keeps blocks on disk: adapters train over it, or say why not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import graftune as gt
from graftune.errors import AdapterError
from graftune.methods.base import Method
from tests.contract.subjects import METHODS, STEPS, logits, shake
from tests.families import FAMILIES
from tests.training.runs import args, curve

READS_WEIGHTS = ("bitfit", "full", "said", "selective", "norms", "diffpruning", "fishmask")
"""Methods of which the weights themselves are read or changed."""
TRAINS_NORMS = ("houlsby", "compacter", "compacterpp")
ON_DISK = {f"model.layers.{n}": "disk" for n in range(2)}
REST = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    FAMILIES["llama"].build().save_pretrained(folder)
    return folder


def offloaded(saved: Path, folder: Path) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        saved, device_map={**ON_DISK, **REST}, offload_folder=str(folder / "offloaded")
    )
    assert model.model.layers[0].self_attn.q_proj.weight.is_meta
    return model


def batch() -> dict[str, Any]:
    inputs = FAMILIES["llama"].inputs()
    return {**inputs, "labels": inputs["input_ids"]}


def gradients(model: Any, method: Method) -> list[Any]:
    data = [batch()] if method.needs_data else None
    adapter = gt.attach(model, method, "task", seed=1, data=data)
    if method.needs_steps(adapter):
        adapter.begin(STEPS)
    shake(adapter, seed=1)
    model.train()
    torch.manual_seed(0)  # what drops out is the same
    model(**batch()).loss.backward()
    return [parameter.grad for parameter in adapter.parameters()]


@pytest.mark.parametrize("name", [n for n in METHODS if n != "gain" and n not in READS_WEIGHTS])
def test_gradients_are_those_over_a_base_in_memory(name: str, saved: Path, tmp_path: Path) -> None:
    method = METHODS[name]
    if name in TRAINS_NORMS:
        method = type(method)(bottleneck=4, train_norms=False)  # type: ignore[call-arg]
    found = gradients(offloaded(saved, tmp_path), method)
    expected = gradients(FAMILIES["llama"].build(), method)
    for one, other in zip(found, expected, strict=True):
        assert one is other is None or torch.equal(one, other)


@pytest.mark.parametrize(
    "method",
    [
        *(METHODS[name] for name in (*READS_WEIGHTS, *TRAINS_NORMS)),
        gt.LoRA(r=2, dora=True),
        gt.LoRA(r=2, init="pissa"),
        gt.LadderSideTuning(reduction=2),
    ],
    ids=str,
)
def test_what_must_read_or_change_the_weights_is_refused(
    method: Method, saved: Path, tmp_path: Path
) -> None:
    model = offloaded(saved, tmp_path)
    expected = logits(model, FAMILIES["llama"].inputs())
    data = [batch()] if method.needs_data else None
    with pytest.raises(AdapterError, match="kept on disk or in another memory by accelerate"):
        gt.attach(model, method, data=data)
    assert gt.adapters(model) == {}
    assert torch.equal(logits(model, FAMILIES["llama"].inputs()), expected)


def run(model: Any, folder: Path) -> Any:
    gt.attach(model, gt.LoRA(r=2), name="task", seed=0)
    ids = torch.randint(5, 98, (12, 8), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [{"input_ids": row, "labels": row} for row in ids]
    trainer = gt.Trainer(
        model, args(folder, num_train_epochs=2, save_steps=3), train_dataset=rows, loss_chunk=8
    )
    trainer.train()
    return trainer


def test_it_trains_saves_and_serves_as_one_in_memory(saved: Path, tmp_path: Path) -> None:
    plain = run(FAMILIES["llama"].build(), tmp_path / "plain")
    far = run(offloaded(saved, tmp_path), tmp_path / "far")
    assert curve(far) == curve(plain)
    assert far.model.model.layers[0].self_attn.q_proj.weight.is_meta
    gt.adapters(far.model)["task"].save(tmp_path / "adapter")
    fresh = FAMILIES["llama"].build()
    gt.load(fresh, tmp_path / "adapter")
    expected = logits(plain.model.eval(), FAMILIES["llama"].inputs())
    assert torch.equal(logits(fresh, FAMILIES["llama"].inputs()), expected)
    again = offloaded(saved, tmp_path / "again")
    gt.load(again, tmp_path / "adapter", name="task")
    assert torch.equal(logits(again, FAMILIES["llama"].inputs()), expected)
    with pytest.raises(AdapterError, match="kept on disk or in another memory by accelerate"):
        gt.merge(again, "task")
