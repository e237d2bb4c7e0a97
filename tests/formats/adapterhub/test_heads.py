"""Heads that lie beside AdapterHub's adapters, onto the models' own heads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import graftune as gt
from graftune.errors import BaseMismatchError, FormatError
from tests.families import FAMILIES, LABELS
from tests.formats.adapterhub.directories import (
    BOTTLENECK,
    WIDTH,
    bottlenecks,
    write,
    write_head,
)

FLEX = {
    "activation_function": "tanh",
    "bias": True,
    "head_type": "classification",
    "layers": 2,
    "num_labels": LABELS,
    "use_pooler": False,
}


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path / "a", BOTTLENECK, bottlenecks("bert", BOTTLENECK), "bert")


def flex(sizes: dict[int, tuple[int, int]]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for index, (out, fan_in) in sizes.items():
        tensors[f"heads.task.{index}.weight"] = draw(out, fan_in)
        tensors[f"heads.task.{index}.bias"] = draw(out)
    return tensors


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(**FAMILIES["bert"].inputs()).logits


def test_a_static_head_is_loaded(path: Path) -> None:
    head = {"classifier.weight": draw(LABELS, WIDTH), "classifier.bias": draw(LABELS)}
    write_head(path, None, head)
    adapter = gt.load(FAMILIES["bert"].build(), path)
    assert adapter.head_names == ("classifier",)
    own = adapter.state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in head.items())


def test_the_models_own_head_adds_nothing(path: Path) -> None:
    model = FAMILIES["bert"].build()
    own = {f"classifier.{n}": t.detach().clone() for n, t in model.classifier.named_parameters()}
    write_head(path, None, own)
    assert gt.load(model, path).head_names == ()


def test_two_layers_are_berts_pooler_and_classifier(path: Path, tmp_path: Path) -> None:
    tensors = flex({1: (WIDTH, WIDTH), 4: (LABELS, WIDTH)})
    write_head(path, FLEX, tensors)
    model = FAMILIES["bert"].build()
    adapter = gt.load(model, path, name="a")
    first = model.bert(**FAMILIES["bert"].inputs()).last_hidden_state[:, 0]
    inner = torch.tanh(
        F.linear(first, tensors["heads.task.1.weight"], tensors["heads.task.1.bias"])
    )
    expected = F.linear(inner, tensors["heads.task.4.weight"], tensors["heads.task.4.bias"])
    torch.testing.assert_close(logits(model), expected)
    again = FAMILIES["bert"].build()
    gt.load(again, adapter.save(tmp_path / "own"), name="a")
    assert torch.equal(logits(again), logits(model))


def test_one_layer_on_the_pooler_is_berts_classifier(path: Path) -> None:
    write_head(path, FLEX | {"layers": 1, "use_pooler": True}, flex({1: (LABELS, WIDTH)}))
    assert gt.load(FAMILIES["bert"].build(), path).head_names == ("classifier",)


@pytest.mark.parametrize(
    ("config", "sizes", "told", "kind"),
    [
        (FLEX, {1: (WIDTH, WIDTH), 4: (7, WIDTH)}, "head of another size", BaseMismatchError),
        (FLEX, {1: (LABELS, WIDTH)}, "head of kind classification with 1 layers", FormatError),
        (
            FLEX | {"activation_function": "relu"},
            {1: (WIDTH, WIDTH), 4: (LABELS, WIDTH)},
            r"2 layers \(relu\), which this BertForSequenceClassification has not",
            FormatError,
        ),
        (FLEX | {"head_type": "tagging"}, {1: (LABELS, WIDTH)}, "kind tagging", FormatError),
        (FLEX | {"head_type": "dependency_parsing"}, {1: (2, 2)}, "dependency_pars", FormatError),
    ],
)
def test_a_head_that_does_not_fit_can_be_left_out(
    path: Path, config: Any, sizes: Any, told: str, kind: type[Exception]
) -> None:
    write_head(path, config, flex(sizes))
    model = FAMILIES["bert"].build()
    with pytest.raises(kind, match=f"{told}.*pass head=False"):
        gt.load(model, path)
    assert gt.adapters(model) == {}
    assert gt.load(model, path, head=False).head_names == ()


def test_a_model_without_that_head_is_told(path: Path) -> None:
    write_head(path, None, {"lm_head.weight": draw(9, WIDTH)})
    with pytest.raises(FormatError, match=r'has no "lm_head\.weight": pass head=False'):
        gt.load(FAMILIES["bert"].build(), path)
