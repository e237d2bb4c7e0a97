"""What is written in AdapterHub's form is read again as the same function, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import graftune as gt
from graftune.errors import FormatError
from graftune.formats.adapterhub.writing import save
from tests.contract.subjects import shake
from tests.families import FAMILIES
from tests.formats.adapterhub.directories import BOTTLENECK, FORMS, bottlenecks, write

QV = ("query", "value")
WRITTEN: list[tuple[str, Any]] = [
    *(
        (family, method)
        for family in ("bert", "gpt2", "llama", "t5", "vit")
        for method in (
            gt.HoulsbyAdapter(train_norms=False, bottleneck=5),
            gt.PfeifferAdapter(reduction=4, scale="learned", norm_before=True, norm_after=True),
            gt.ParallelAdapter(reads="residual", layers=(0,)),
            gt.LoRA(r=3, alpha=5, targets=QV),
            gt.IA3(targets=("key", "value"), feedforward=()),
        )
    ),
    ("bert", gt.AdapterPlus(reduction=8)),
    ("bert", gt.PfeifferAdapter(skips="sum", activation="leaky_relu")),
    ("llama", gt.PfeifferAdapter(skips="read", reduction={"0": 2, "default": 8})),
    ("bert", gt.ParallelAdapter(sublayers=("attention",), scale=2)),
    ("t5", gt.PfeifferAdapter(sublayers=("cross-attention", "ffn"))),
    ("bert", gt.Compacter(train_norms=False, reduction=2)),
    ("llama", gt.CompacterPlusPlus(train_norms=False, reduction=2, shared_W_phm=True)),
    ("t5", gt.Compacter(train_norms=False, reduction=2, shared_phm_rule=False)),
    ("bert", gt.PfeifferAdapter(reduction=4, invertible=True)),
    ("gpt2", gt.PfeifferAdapter(reduction=4, invertible=True, undo_at_head=False)),
    (
        "t5",
        gt.HoulsbyAdapter(
            train_norms=False, invertible=True, invertible_reduction=4, undo_at_head=False
        ),
    ),
    ("gpt2", gt.LoRA(r=2, targets=("query", "key", "value", "up"), rslora=True)),
    ("gpt2", gt.LoRA(r=2, targets=("value", "down"), init="pissa")),
    ("llama", gt.LoRA(r=2, targets=("query", "down", "up"), dora=True, alpha=6)),
    ("vit", gt.LoRA(r=2, targets=("up", "down"), layers=(1,))),
    ("gpt2", gt.LoRA(r=2, alpha=3, targets=("query", "value", "up"), gate="mean-padded")),
    ("llama", gt.IA3(targets=("key", "value"), feedforward=(), gate="mean-padded")),
    ("bert", gt.PfeifferAdapter(reduction=4, gate="mean-padded", scale=2.0)),
]


def logits(model: Any, family: str) -> Tensor:
    with torch.no_grad():
        return model(**FAMILIES[family].inputs()).logits


@pytest.mark.parametrize(
    ("family", "method"), WRITTEN, ids=lambda part: getattr(part, "name", part)
)
def test_it_comes_back_as_the_same_function(family: str, method: Any, tmp_path: Path) -> None:
    model = FAMILIES[family].build()
    adapter = gt.attach(model, method, name="a", seed=0)
    shake(adapter, 1)
    path = save(adapter, tmp_path / "a")
    again = FAMILIES[family].build()
    gt.load(again, path, name="a")
    torch.testing.assert_close(logits(again, family), logits(model, family), atol=1e-5, rtol=1e-5)
    assert gt.inspect(path).wrote == "AdapterHub adapters 1.3.0"


def test_the_directory_is_written_as_theirs(tmp_path: Path) -> None:
    adapter = gt.attach(FAMILIES["vit"].build(), gt.HoulsbyAdapter(train_norms=False), name="a")
    path = save(adapter, tmp_path / "a")
    text = (path / "adapter_config.json").read_text()
    config = json.loads(text)
    assert text == json.dumps(config, indent=2, sort_keys=True)
    assert config["config"]["mh_adapter"] is True
    assert "architecture" not in config["config"]
    assert (config["model_type"], config["name"]) == ("vit", "a")
    assert {entry.name for entry in gt.inspect(path).tensors} >= {
        "vit.encoder.layer.1.attention_adapters.adapters.a.adapter_down.0.weight",
        "vit.encoder.layer.1.output.output_adapters.adapters.a.adapter_up.bias",
    }


def test_a_head_goes_with_it(tmp_path: Path) -> None:
    model = FAMILIES["bert"].build()
    adapter = gt.attach(model, gt.PfeifferAdapter(), name="a", seed=0)
    shake(adapter, 1)
    path = save(adapter, tmp_path / "a")
    config = json.loads((path / "head_config.json").read_text())
    assert (config["config"], config["num_labels"]) == (None, 3)
    again = FAMILIES["bert"].build()
    assert gt.load(again, path, name="a").head_names == ("classifier",)
    torch.testing.assert_close(logits(again, "bert"), logits(model, "bert"))


def test_dora_that_came_from_there_goes_back(tmp_path: Path) -> None:
    tensors = {
        f"bert.encoder.layer.{index}.attention.self.query.loras.task.{name}": torch.rand(shape)
        for index in range(2)
        for name, shape in {"lora_A": (2, 32), "lora_B": (32, 2), "m.weight": (32, 1)}.items()
    }
    settings = {"architecture": "lora", "alpha": 4, "r": 2, "attn_matrices": ["q"]}
    path = write(tmp_path / "a", settings | {"use_dora": True}, tensors, "bert")
    adapter = gt.load(FAMILIES["bert"].build(), path, name="task")
    again = gt.load(FAMILIES["bert"].build(), save(adapter, tmp_path / "b"), name="task")
    for name, tensor in adapter.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor)


def test_the_old_form_of_a_file_is_brought_up_to_date(tmp_path: Path) -> None:
    config = BOTTLENECK | FORMS["double_seq_bn"]
    old = {
        k.replace(".adapters.", ".layer_text_task_adapters."): t
        for k, t in bottlenecks("bert", config).items()
    }
    path = write(tmp_path / "a", config, old, "bert", version="2.3.0", type="text_task")
    adapter = gt.load(FAMILIES["bert"].build(), path, name="task")
    names = {entry.name for entry in gt.inspect(save(adapter, tmp_path / "b")).tensors}
    assert names == set(bottlenecks("bert", config))


@pytest.mark.parametrize(
    ("family", "method", "told"),
    [
        ("bert", gt.HoulsbyAdapter(), "values of its own for .*LayerNorm.bias.*keeps frozen"),
        ("llama", gt.ParallelAdapter(), 'reads="residual"'),
        ("bert", gt.PfeifferAdapter(activation="elu"), "no activation elu"),
        ("bert", gt.LoRA(r=2), "it changes output, and AdapterHub's settings know query, key"),
        ("bert", gt.LoRA(r=2, targets="qv", rank_pattern={"value": 3}), "ranks or scales differ"),
        ("bert", gt.LoRA(r=2, targets="qv", lora_bias=True), "lora_bias"),
        ("bert", gt.LoRA(r=2, targets="qv", gate="mean"), 'gate="mean-padded"'),
        ("bert", gt.PfeifferAdapter(gate="token"), 'kind "token".*gate="mean-padded"'),
        (
            "bert",
            gt.LoRA(r=2, alpha=4, targets="qv", gate="mean-padded", gate_times_scale=True),
            "multiply the scaled change",
        ),
        ("bert", gt.LoRA(r=2, targets="qv", dora=True), "turns a linear's bias too"),
        ("gpt2", gt.LoRA(r=2, targets=("query",), dora=True), "no DoRA on linears that hold"),
        ("llama", gt.LoRA(r=2, targets=("layers.0.self_attn.q_proj", "v_proj")), "other linears"),
        ("bert", gt.IA3(), "can't change bert.encoder.layer.0.output.dense.input so"),
        ("bert", gt.BitFit(train_head=False), "keeps frozen"),
        ("bert", gt.LoHa(r=2), "LoHa can't be written so"),
        ("mixtral", gt.PfeifferAdapter(), "models of type mixtral aren't known here; known are"),
        ("gpt2", gt.LoRA(r=2, targets="qv", trainable_tokens=(7,)), "can't change transformer.wte"),
        ("t5", gt.Compacter(train_norms=False, reduction=2), "what maps share in T5"),
        ("llama", gt.PfeifferAdapter(invertible=True), "undo_at_head=False"),
    ],
    ids=lambda part: getattr(part, "name", part),
)
def test_what_adapterhub_cannot_compute_is_refused(
    family: str, method: Any, told: str, tmp_path: Path
) -> None:
    adapter = gt.attach(FAMILIES[family].build(), method, name="a", seed=0)
    shake(adapter, 1)
    with pytest.raises(FormatError, match=f'Adapter "a" in AdapterHub\'s form: .*{told}'):
        save(adapter, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_folder_in_use_is_kept(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    adapter = gt.attach(FAMILIES["bert"].build(), gt.PfeifferAdapter())
    with pytest.raises(FormatError, match="not empty"):
        save(adapter, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]
