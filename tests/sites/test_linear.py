"""The linear site: adapters act in their own order, wherever at a host their changes are."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graftune as gt
from graftune.sites.base import Graft, LinearDelta, LinearPlace
from graftune.sites.placing import insert, remove
from graftune.sites.state import Active


class Plus(LinearDelta):
    """y + 1."""

    def forward(self, x: Tensor, y: Tensor, host: nn.Module) -> Tensor:
        return y + 1


class Times(LinearDelta):
    """y * 2."""

    def forward(self, x: Tensor, y: Tensor, host: nn.Module) -> Tensor:
        return y * 2


@pytest.fixture
def active() -> Active:
    return Active()


@pytest.fixture
def model(active: Active) -> nn.Sequential:
    """A linear that answers zeros, with a change of two features and one of all."""
    model = nn.Sequential(nn.Linear(2, 4))
    nn.init.zeros_(model[0].weight)
    nn.init.zeros_(model[0].bias)
    insert(model, active, "part", [Graft(LinearPlace("0", "key", ((1, 3),)), Times())])
    insert(model, active, "whole", [Graft(LinearPlace("0"), Plus())])
    return model


def answer(model: nn.Module, active: Active, names: Any) -> list[float]:
    active.set(names)
    return model(torch.ones(1, 2))[0].tolist()


def test_slices_and_the_whole_act_in_the_adapters_order(
    model: nn.Sequential, active: Active
) -> None:
    assert answer(model, active, gt.Stack("whole", "part")) == [1, 2, 2, 1]
    assert answer(model, active, gt.Stack("part", "whole")) == [1, 1, 1, 1]


def test_rows_see_every_site_of_a_host(model: nn.Sequential, active: Active) -> None:
    active.set(gt.Rows([gt.Stack("whole", "part"), None, "whole"]))
    assert model(torch.ones(3, 2)).tolist() == [[1, 2, 2, 1], [0, 0, 0, 0], [1, 1, 1, 1]]


@pytest.mark.parametrize("name", ["part", "whole"])
def test_the_others_act_on_when_one_is_taken_off(
    model: nn.Sequential, active: Active, name: str
) -> None:
    remove(model, name)
    left = "whole" if name == "part" else "part"
    assert answer(model, active, left) == ([1] * 4 if left == "whole" else [0] * 4)
    delta = Times() if name == "part" else Plus()
    rows = ((1, 3),) if name == "part" else None
    insert(model, active, name, [Graft(LinearPlace("0", "key", rows), delta)])
    assert answer(model, active, gt.Stack("whole", "part")) == [1, 2, 2, 1]
    assert answer(model, active, gt.Stack("part", "whole")) == [1, 1, 1, 1]


def test_a_copys_sites_are_its_own(model: nn.Sequential, active: Active) -> None:
    twin = copy.deepcopy(model)
    deltas: Any = twin[0].deltas
    assert deltas.key.sites == (deltas.key, deltas.output)
    assert deltas.output.sites == ()
