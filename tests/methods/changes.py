"""What the tests of methods that change whole weights share: hosts, and plain answers of theirs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graftune as gt
from graftune.methods.base import Method
from tests.contract.subjects import shake
from tests.families import FAMILIES

HOSTS = {
    "linear": ("bert", "bert.encoder.layer.0.intermediate.dense"),
    "Conv1D": ("gpt2", "transformer.h.0.mlp.c_fc"),
    "grouped heads": ("llama", "model.layers.0.self_attn.k_proj"),
    "embedding": ("gemma2", "model.embed_tokens"),
    "convolution": ("vit", "vit.embeddings.patch_embeddings.projection"),
    "1-D convolution": ("whisper", "model.encoder.conv1"),
}
"""A module of each kind: its family and path."""


def attached(kind: str, make: Any, **settings: Any) -> tuple[Any, Any]:
    """Returns a module of a kind with a change on it that is off its start, and the delta."""
    family, path = HOSTS[kind]
    model = FAMILIES[family].build()
    adapter = gt.attach(model, make(targets=(path,), train_head=False, **settings), seed=0)
    shake(adapter, seed=1, noise=0.3)
    host: Any = model.get_submodule(path)
    return host, host.deltas["default"]


def an_input(kind: str) -> Tensor:
    """Returns an input for the module of a kind."""
    torch.manual_seed(2)
    if kind == "embedding":
        return torch.randint(0, 99, (2, 5))
    if kind == "convolution":
        return torch.randn(2, 3, 16, 16)
    return torch.randn(2, 8, 20) if kind == "1-D convolution" else torch.randn(2, 5, 32)


def with_weight(host: Any, change: Tensor, x: Tensor) -> Tensor:
    """Returns what a plain module of the weight W + `change`, `(out, in, ...)`, answers."""
    if isinstance(host, nn.Embedding):
        return (host.weight + change.t())[x] * float(getattr(host, "embed_scale", 1.0))
    if isinstance(host, nn.Conv2d):
        return F.conv2d(x, host.weight + change, host.bias, host.stride, host.padding)
    if isinstance(host, nn.Conv1d):
        return F.conv1d(x, host.weight + change, host.bias, host.stride, host.padding)
    weight = host.weight.t() if hasattr(host, "nf") else host.weight
    return F.linear(x, weight + change, host.bias)


def check_equation(kind: str, host: Any, change: Tensor) -> None:
    """Checks that a host's answer is that of the changed weight, and that merging writes it."""
    x = an_input(kind)
    torch.testing.assert_close(host(x), with_weight(host, change, x), atol=3e-6, rtol=1e-5)
    delta = host.deltas["default"]
    torch.testing.assert_close(delta.merged(torch.zeros_like(change), host), change)


def check_experts(method: Method, tensor: str, change_of: Callable[[Any, int], Tensor]) -> None:
    """Checks that a method changes each expert of a 3-D tensor by `change_of(delta, expert)`."""
    model = FAMILIES["mixtral"].build()
    shake(gt.attach(model, method), seed=1, noise=0.3)
    experts: Any = model.model.layers[0].mlp.experts
    delta, weights = experts.deltas["default"]._modules[tensor], getattr(experts, tensor)
    for e, changed in enumerate(delta(weights, weights)):
        torch.testing.assert_close(changed, weights[e] + change_of(delta, e))


def check_count_on_a_convolution(make: Any, expected: int, **settings: Any) -> None:
    """Checks a method's count on a patch embedding, before and after it is attached."""
    model = FAMILIES["vit"].build()
    method = make(targets=("projection",), train_head=False, **settings)
    assert method.count(model, gt.anatomy(model)) == expected
    assert gt.attach(model, method).count() == expected


def check_uniform(tensor: Tensor, fan_in: int, within: float) -> None:
    """Checks that a tensor is uniform up to 1 / sqrt(fan_in); `within` is for its deviation."""
    bound = 1 / math.sqrt(fan_in)
    assert 0.99 * bound < tensor.abs().max() <= bound
    assert math.isclose(tensor.std().item(), bound / math.sqrt(3), rel_tol=within)


def learns(method: Method, family: str = "bert") -> tuple[float, float]:
    """Returns the loss of one batch before and after 30 steps on it."""
    kind = FAMILIES[family]
    model = kind.build()
    adapter = gt.attach(model, method, seed=0)
    inputs = {**kind.inputs(batch=4), **kind.labels(model, kind.inputs(batch=4))}
    optimizer = torch.optim.Adam(list(adapter.parameters()), lr=0.02)
    losses: list[float] = []
    for _ in range(30):
        loss = model(**inputs).loss
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses[0], losses[-1]
