from __future__ import annotations

import torch
from torch import nn

from graftune.training import diagnosis
from tests.training.models import tiny


def batch() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.tensor([[5, 6, 7]]), "labels": torch.tensor([1])}


def test_the_innermost_module_is_named_with_its_bad_weight() -> None:
    model = tiny(dropout=0.0)
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight[0, 0] = float("nan")
    clause = diagnosis.first_nonfinite(model, batch())
    assert clause.startswith('"bert.encoder.layer.1.output.dense" is the first module')
    assert '"weight" isn\'t finite either' in clause
    assert diagnosis.nonfinite_parameter(model) == '"bert.encoder.layer.1.output.dense.weight"'


def test_finite_weights_are_said_to_be() -> None:
    model = tiny(dropout=0.0)
    with torch.no_grad():
        model.classifier.weight.fill_(3e38)
        model.classifier.bias.fill_(3e38)
    clause = diagnosis.first_nonfinite(model, batch())
    assert '"classifier"' in clause
    assert "its weights are" in clause


def test_no_hook_stays() -> None:
    model = tiny()
    diagnosis.first_nonfinite(model, batch())
    assert not any(module._forward_hooks for module in model.modules())


def test_without_a_bad_output_weights_then_gradients_are_named() -> None:
    model = tiny(dropout=0.0)
    assert "by chance" in diagnosis.first_nonfinite(model, batch())
    model.classifier.bias.grad = torch.full((3,), float("inf"))
    assert diagnosis.nonfinite_gradient(model) == '"classifier.bias"'
    assert 'gradient of "classifier.bias"' in diagnosis.first_nonfinite(model, batch())
    model.unused = nn.Parameter(torch.tensor([float("nan")]))
    assert 'parameter "unused"' in diagnosis.first_nonfinite(model, batch())
