"""Every kind of host is read alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from graftune.errors import AdapterError
from graftune.sites import hosts
from tests.families import FAMILIES

HOSTS: list[tuple[nn.Module, str, tuple[int, int]]] = [
    (nn.Linear(3, 5), "linear", (3, 5)),
    (nn.Linear(3, 5, bias=False), "linear", (3, 5)),
    (Conv1D(5, 3), "linear", (3, 5)),
    (nn.Embedding(7, 5), "embedding", (7, 5)),
    (nn.Conv1d(3, 5, 2), "conv", (3, 5)),
    (nn.Conv2d(3, 5, 2), "conv", (3, 5)),
    (nn.Conv2d(4, 6, 2, groups=2), "conv", (2, 6)),
]


class Quantised(nn.Module):
    """What 4-bit linears look like: bytes for a weight, and the sizes they stand for."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 3, 5
        packed = torch.zeros(8, 1, dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)


@pytest.mark.parametrize(("host", "kind", "size"), HOSTS)
def test_sizes_and_weights_are_out_by_in(host: Any, kind: str, size: tuple[int, int]) -> None:
    assert hosts.kind_of(host) == kind
    assert hosts.features(host) == size
    weight = hosts.read(host)
    assert weight.shape[:2] == size[::-1]
    assert weight.data_ptr() == host.weight.data_ptr()  # a view
    assert torch.equal(hosts.oriented(host, weight), host.weight)
    assert not hosts.is_quantised(host)


def test_a_conv1d_is_read_as_the_map_it_is() -> None:
    host, x = Conv1D(5, 3), torch.randn(2, 3)
    torch.testing.assert_close(host(x), x @ hosts.read(host).t() + host.bias)


def test_a_router_without_sizes_of_its_own_is_read_by_its_weight() -> None:
    host = FAMILIES["mixtral"].build().model.layers[0].mlp.gate
    assert hosts.features(host) == (32, 4)


def test_other_tensors_are_read_as_they_are() -> None:
    host = FAMILIES["mixtral"].build().model.layers[0].mlp.experts
    assert hosts.kind_of(host, "down_proj") == "tensor"
    assert hosts.read(host, "down_proj") is host.down_proj


def test_a_quantised_weight_is_known_and_never_read() -> None:
    host = Quantised()
    assert hosts.is_quantised(host)
    assert hosts.features(host) == (3, 5)
    assert hosts.delta_options(host)["dtype"] == torch.float32
    with pytest.raises(AdapterError, match=r"weight of a Quantised is quantised.*16 or 32 bit"):
        hosts.read(host)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_new_tensors_are_at_least_32_bit(dtype: torch.dtype, expected: torch.dtype) -> None:
    options = hosts.delta_options(nn.Linear(3, 5, dtype=dtype))
    assert options == {"device": torch.device("cpu"), "dtype": expected}


def test_a_missing_bias_is_made_beside_the_weight() -> None:
    host = nn.Linear(3, 5, bias=False, dtype=torch.bfloat16, device="meta")
    options = hosts.delta_options(host, "bias")
    assert options == {"device": torch.device("meta"), "dtype": torch.float32}


def test_ranges_are_read_in_their_order_on_the_device_asked_for() -> None:
    assert hosts.row_index([(4, 6), (0, 2)]).tolist() == [4, 5, 0, 1]
    found = hosts.row_index([(0, 3)], torch.device("meta"))
    assert (found.shape, found.dtype, found.device.type) == ((3,), torch.int64, "meta")


def test_an_embedding_that_multiplies_its_rows_says_by_how_much() -> None:
    gemma = FAMILIES["gemma2"].build().model.embed_tokens
    assert float(hosts.embedding_scale(gemma)) == pytest.approx(gemma.embedding_dim**0.5)
    assert hosts.embedding_scale(nn.Embedding(7, 5)) == 1.0
