"""The sublayer site: what a delta sees of its pass, in rows, threads and copies, compiled."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graftune as gt
from graftune.sites.base import Graft, LinearDelta, LinearPlace, Seen, SublayerDelta, SublayerPlace
from graftune.sites.placing import insert, remove
from graftune.sites.state import Active
from graftune.sites.sublayer import SublayerSite


class Block(nn.Module):
    """y = N(x + F(x)), with N(x) = x / 10 and F a linear; returns a tuple as attentions do."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.norm = Answer(), Tenth()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.f(x)[0])


class Answer(nn.Module):
    """A sublayer that answers (2 x, weights)."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(2, 2, bias=False)
        nn.init.eye_(self.dense.weight)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, str]:
        return 2 * self.dense(hidden_states), "weights"


class Tenth(nn.Module):
    """x / 10."""

    def forward(self, x: Tensor) -> Tensor:
        return x / 10


class Adds(SublayerDelta):
    """h plus a number of what it reads."""

    def __init__(self, source: str, factor: float = 1.0) -> None:
        super().__init__()
        self.source, self.factor = source, factor

    @property
    def reads(self) -> frozenset[str]:
        return frozenset({"residual", "norm"} if self.source == "sum" else {self.source} - {"h"})

    def forward(self, h: Tensor, seen: Seen) -> Tensor:
        if self.source == "h":
            return h + self.factor * h
        if self.source == "sum":
            assert seen.norm is not None
            assert seen.residual is not None
            return h + self.factor * seen.norm(h + seen.residual)
        read = getattr(seen, self.source)
        assert read is not None
        return h + self.factor * read


PLACE = SublayerPlace("0.f", "0.ffn", "0.f.dense", "0.f", "0.norm")


def a_model(**deltas: Adds) -> tuple[Any, Active]:
    """Returns a model of one block with an adapter for each delta."""
    model, active = nn.Sequential(Block()), Active()
    for name, delta in deltas.items():
        insert(model, active, name, [Graft(PLACE, delta)])
    return model, active


def answer(model: nn.Module, active: Active, composition: Any, rows: int = 1) -> list[float]:
    """Returns what the first feature of each row of ones becomes, in tenths: 3 for the base."""
    active.set(composition)
    return [round(10 * y, 4) for y in model(torch.ones(rows, 2))[:, 0].tolist()]


@pytest.mark.parametrize(
    ("source", "expected"),
    [("h", 1 + 2 + 2), ("input", 1 + 2 + 1), ("residual", 1 + 2 + 1), ("sum", 1 + 2 + 0.3)],
)
def test_a_delta_sees_what_it_asks_for(source: str, expected: float) -> None:
    model, active = a_model(a=Adds(source))
    assert answer(model, active, "a") == [expected]
    assert answer(model, active, None) == [3]


def test_the_rest_of_a_tuple_is_left() -> None:
    model, active = a_model(a=Adds("h"))
    active.set("a")
    assert model[0].f(torch.ones(1, 2))[1] == "weights"


def test_what_was_read_by_keyword_is_found() -> None:
    model, active = a_model(a=Adds("residual"))
    active.set("a")
    h, _ = model[0].f(hidden_states=torch.ones(1, 2))
    assert h.tolist() == [[3, 3]]


def test_adapters_act_in_their_order() -> None:
    model, active = a_model(double=Adds("h"), plus=Adds("input"))
    assert answer(model, active, gt.Stack("double", "plus")) == [1 + 2 * 2 + 1]
    assert answer(model, active, gt.Stack("plus", "double")) == [1 + (2 + 1) * 2]


def test_it_acts_behind_what_else_is_on_its_host() -> None:
    class Plus(LinearDelta):
        def forward(self, x: Tensor, y: Tensor, host: nn.Module) -> Tensor:
            return y + 1

    model, active = nn.Sequential(nn.Linear(2, 2)), Active()
    nn.init.zeros_(model[0].weight)
    nn.init.zeros_(model[0].bias)
    insert(model, active, "late", [Graft(SublayerPlace("0", "0.ffn", "0"), Adds("h"))])
    insert(model, active, "plus", [Graft(LinearPlace("0"), Plus())])
    for composition in (gt.Stack("late", "plus"), gt.Stack("plus", "late")):
        active.set(composition)
        assert model(torch.ones(1, 2)).tolist() == [[2, 2]]


def test_each_row_is_its_members() -> None:
    model, active = a_model(h=Adds("h"), x=Adds("input", 2), total=Adds("sum", 10))
    rows = gt.Rows(["h", None, "x", gt.Stack("h", "x"), "total"])
    alone = [answer(model, active, member)[0] for member in rows.members]
    assert alone == [5, 3, 5, 7, 6]
    assert answer(model, active, rows, rows=5) == alone
    assert answer(model, active, rows, rows=10) == [y for y in alone for _ in range(2)]


def test_an_average_is_the_mean_of_what_each_makes() -> None:
    model, active = a_model(h=Adds("h"), x=Adds("input", 4))
    mean = gt.Average("h", "x", weights=(0.25, 0.75))
    assert answer(model, active, mean) == [0.25 * 5 + 0.75 * 7]


def test_dropped_blocks_are_the_bases() -> None:
    model, active = nn.Sequential(Block()), Active()
    insert(model, active, "a", [Graft(PLACE, Adds("residual"))], layers={"0": 0})
    active.set("a", 1)
    assert round(10 * model(torch.ones(1, 2))[0, 0].item(), 4) == 3
    active.set("a", 0)
    assert round(10 * model(torch.ones(1, 2))[0, 0].item(), 4) == 4


def test_nothing_is_kept_when_a_pass_is_over() -> None:
    model, active = a_model(a=Adds("residual"), b=Adds("sum"), c=Adds("input"))
    kept = site_of(model).kept
    for composition in (None, "a", gt.Stack("a", "b", "c"), gt.Rows(["a", "b"])):
        answer(model, active, composition, rows=2)
        assert not kept


def test_threads_keep_apart_what_they_read() -> None:
    model, active = a_model(a=Adds("residual"))
    active.set("a")
    begun, done, found = threading.Barrier(2), threading.Barrier(2), {}

    def wait(*_: Any) -> None:
        begun.wait(5)  # both have read, neither has answered
        done.wait(5)

    model[0].f.dense.register_forward_hook(wait)

    def run(value: float) -> None:
        found[value] = model(torch.full((1, 2), value))[0, 0].item()

    threads = [threading.Thread(target=run, args=(value,)) for value in (1.0, 5.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {k: round(10 * v, 4) for k, v in found.items()} == {1.0: 4, 5.0: 20}
    assert not site_of(model).kept


def test_threads_can_use_different_adapters() -> None:
    model = gt_model()
    inputs = torch.tensor([[5, 6, 7]])
    alone, together = {}, {}
    for name in ("a", "b", None):
        with torch.no_grad(), gt.using(model, name):
            alone[name] = model(inputs).logits

    def run(name: str | None) -> None:
        for _ in range(5):
            with torch.no_grad(), gt.using(model, name):
                together[name] = model(inputs).logits

    threads = [threading.Thread(target=run, args=(name,)) for name in alone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(together[name], alone[name]) for name in alone)


def gt_model() -> Any:
    """Returns a tiny LLaMA with two Pfeiffer adapters."""
    from tests.contract.subjects import shake
    from tests.families import FAMILIES

    model = FAMILIES["llama"].build()
    for name, seed in (("a", 1), ("b", 2)):
        shake(gt.attach(model, gt.PfeifferAdapter(reduction=8), name), seed=seed, noise=0.2)
    return model


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copys_site_reads_its_own_modules(twin_of: Any) -> None:
    model, active = a_model(a=Adds("sum", 10))
    assert answer(model, active, "a") == [6]
    site_of(model).kept["residual", 0] = torch.ones(1)  # as if copied within a pass
    twin = twin_of(model)
    assert not site_of(twin).kept
    assert site_of(twin).norm == (twin[0].norm,)
    assert round(10 * twin(torch.ones(1, 2))[0, 0].item(), 4) == 6
    remove(twin, "a")
    assert round(10 * twin(torch.ones(1, 2))[0, 0].item(), 4) == 3
    site_of(model).kept.clear()
    assert answer(model, active, "a") == [6]


def test_the_last_to_go_leaves_no_hook() -> None:
    model, active = a_model(a=Adds("residual"), b=Adds("sum"))
    remove(model, "a")
    assert answer(model, active, "b") == [3.3]
    remove(model, "b")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any("deltas" in name for name, _ in model.named_modules())
    insert(model, active, "a", [Graft(PLACE, Adds("residual"))])
    assert answer(model, active, "a") == [4]


def test_a_later_adapter_may_read_more() -> None:
    model, active = a_model(a=Adds("h"))
    assert site_of(model).reads == set()
    insert(model, active, "b", [Graft(PLACE, Adds("sum"))])
    assert site_of(model).reads == {"residual", "norm"}
    insert(model, active, "c", [Graft(PLACE, Adds("residual"))])
    assert len(site_of(model).handles) == 2  # one hook to read, one to answer
    assert answer(model, active, gt.Stack("c", "b")) == [1 + 2 + 1 + 0.4]


def test_compiled_it_is_the_same() -> None:
    model, active = a_model(a=Adds("residual"), b=Adds("sum"))
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    for composition in (None, "a", gt.Stack("a", "b")):
        expected = answer(model, active, composition)
        torch._dynamo.reset()
        assert answer(compiled, active, composition) == expected


def site_of(model: Any) -> SublayerSite:
    return model[0].f.deltas.sublayer
