"""Which adapters act: for good, or for one thread or task alone."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graftune as gt
from graftune.errors import AdapterError
from graftune.sites.plan import Plan, joined, taken
from graftune.sites.state import Active
from tests.contract.subjects import logits, shake
from tests.families import FAMILIES

INPUTS = FAMILIES["bert"].inputs()


@pytest.fixture
def model() -> nn.Module:
    """A model with adapters "a" and "b", neither of them active."""
    model = FAMILIES["bert"].build()
    for seed, name in enumerate("ab"):
        shake(gt.attach(model, gt.LoRA(r=2), name, seed=seed), seed)
    gt.activate(model, None)
    return model


@pytest.fixture
def answers(model: nn.Module) -> dict[str | None, Tensor]:
    """What each adapter alone makes of the inputs."""
    found: dict[str | None, Tensor] = {}
    for name in ("a", "b", None):
        gt.activate(model, name)
        found[name] = logits(model, INPUTS)
    assert not torch.equal(found["a"], found["b"])
    return found


def test_using_ends_with_its_block(model: nn.Module, answers: dict[str | None, Tensor]) -> None:
    gt.activate(model, "b")
    with gt.using(model, "a"):
        assert torch.equal(logits(model, INPUTS), answers["a"])
        with gt.using(model, None):
            assert torch.equal(logits(model, INPUTS), answers[None])
            with gt.using(model, "b"):
                assert torch.equal(logits(model, INPUTS), answers["b"])
            assert torch.equal(logits(model, INPUTS), answers[None])
        assert torch.equal(logits(model, INPUTS), answers["a"])
    assert torch.equal(logits(model, INPUTS), answers["b"])
    assert gt.state_of(model).active.overridden == 0


def test_using_ends_with_an_exception(model: nn.Module, answers: dict[str | None, Tensor]) -> None:
    with pytest.raises(ZeroDivisionError), gt.using(model, "a"), gt.using(model, "b"):
        raise ZeroDivisionError
    assert torch.equal(logits(model, INPUTS), answers[None])
    assert gt.state_of(model).active.overridden == 0


def test_using_an_unknown_name_changes_nothing(model: nn.Module) -> None:
    with pytest.raises(AdapterError, match='No adapter is named "c"'), gt.using(model, "c"):
        pass
    assert gt.state_of(model).active.overridden == 0


def test_activating_inside_using_holds_after_it(
    model: nn.Module, answers: dict[str | None, Tensor]
) -> None:
    with gt.using(model, "a"):
        gt.activate(model, "b")
        assert torch.equal(logits(model, INPUTS), answers["a"])
    assert torch.equal(logits(model, INPUTS), answers["b"])


def test_using_is_of_one_model(model: nn.Module, answers: dict[str | None, Tensor]) -> None:
    other = copy.deepcopy(model)
    with gt.using(model, "a"), gt.using(other, "b"):
        assert torch.equal(logits(model, INPUTS), answers["a"])
        assert torch.equal(logits(other, INPUTS), answers["b"])
        with gt.using(model, None):
            assert torch.equal(logits(other, INPUTS), answers["b"])


def test_each_thread_uses_its_own(model: nn.Module, answers: dict[str | None, Tensor]) -> None:
    gate, wrong = threading.Barrier(3), []

    def serve(name: str | None) -> None:
        for _ in range(3):
            with gt.using(model, name):
                gate.wait(30)  # all three are inside `using` now
                if not torch.equal(logits(model, INPUTS), answers[name]):
                    wrong.append(name)
                gate.wait(30)

    threads = [threading.Thread(target=serve, args=(name,)) for name in answers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []
    assert gt.state_of(model).active.overridden == 0


def test_a_thread_does_not_inherit_using(
    model: nn.Module, answers: dict[str | None, Tensor]
) -> None:
    found: list[Tensor] = []
    with gt.using(model, "a"):
        thread = threading.Thread(target=lambda: found.append(logits(model, INPUTS)))
        thread.start()
        thread.join(60)
    assert torch.equal(found[0], answers[None])


def test_each_task_uses_its_own(model: nn.Module, answers: dict[str | None, Tensor]) -> None:
    async def serve(name: str | None) -> list[Tensor]:
        found: list[Tensor] = []
        with gt.using(model, name):
            for _ in range(3):
                await asyncio.sleep(0)  # lets the others in
                found.append(logits(model, INPUTS))
        return found

    async def everyone() -> list[list[Tensor]]:
        return await asyncio.gather(*[serve(name) for name in answers])

    for name, found in zip(answers, asyncio.run(everyone()), strict=True):
        assert all(torch.equal(one, answers[name]) for one in found)


@pytest.mark.parametrize("crowded", [False, True])
def test_a_task_inherits_using_until_its_block_ends(
    model: nn.Module, answers: dict[str | None, Tensor], crowded: bool
) -> None:
    async def serve() -> list[Tensor]:
        ended = asyncio.Event()

        async def child() -> list[Tensor]:
            inside = logits(model, INPUTS)
            await ended.wait()
            return [inside, logits(model, INPUTS)]

        with gt.using(model, "a"):
            task = asyncio.create_task(child())
            await asyncio.sleep(0)
        with gt.using(model, "b" if crowded else None):
            ended.set()
            return await task

    inside, after = asyncio.run(serve())
    assert torch.equal(inside, answers["a"])
    assert torch.equal(after, answers[None])


def test_a_copy_made_inside_using_starts_outside_it(model: nn.Module) -> None:
    gt.activate(model, "b")
    with gt.using(model, "a"):
        twins = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for twin in twins:
        active = gt.state_of(twin).active
        assert active.overridden == 0
        assert active.current().composition == "b"
        with gt.using(twin, None):
            assert active.current().composition is None


def test_a_plan_of_rows_groups_them_by_member() -> None:
    both = gt.Stack("a", "b")
    plan = Plan.of(gt.Rows(["b", None, both, "b"]))
    assert plan.groups == ((("b",), (0, 3)), ((), (1,)), (("a", "b"), (2,)))
    assert plan.size == 4


def test_rows_that_are_all_alike_are_no_groups() -> None:
    plan = Plan.of(gt.Rows(["a", "a"]))
    assert plan.groups is None
    assert plan.names == ("a",)


@pytest.mark.parametrize(
    ("batch", "first", "second"),
    [(3, [0, 2], [1]), (6, [0, 1, 4, 5], [2, 3]), (9, [0, 1, 2, 6, 7, 8], [3, 4, 5])],
)
def test_a_longer_batch_gives_each_member_neighbouring_rows(
    batch: int, first: list[int], second: list[int]
) -> None:
    plan = Plan.of(gt.Rows(["a", "b", "a"]))
    device = torch.device("cpu")
    rows = torch.arange(batch)
    assert taken(rows, plan.rows(0, batch, device)).tolist() == first
    assert taken(rows, plan.rows(1, batch, device)).tolist() == second
    parts = [(at, taken(rows, at)) for at in (plan.rows(g, batch, device) for g in (1, 0))]
    assert joined(parts).tolist() == rows.tolist()


def test_a_batch_that_is_no_multiple_is_refused() -> None:
    plan = Plan.of(gt.Rows(["a", "b", "a"]))
    with pytest.raises(AdapterError, match="Rows names 3 rows, but a module saw a batch of 4"):
        plan.rows(0, 4, torch.device("cpu"))


def test_pins_of_threads_are_counted_whole() -> None:
    active: Any = Active()

    def pin() -> None:
        for _ in range(500):
            with active.pinned(Plan.of("a")):
                assert active.current().names == ("a",)

    threads = [threading.Thread(target=pin) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert active.overridden == 0
    assert active.current().names == ()


@pytest.mark.parametrize("name", ["classifier", "bert.encoder.layer.0.intermediate.dense"])
def test_threads_never_see_each_others_tensors(name: str) -> None:
    """A host whose tensors are others serves one thread at a time."""
    model = FAMILIES["bert"].build()
    for seed, adapter in enumerate("ab"):
        shake(gt.attach(model, gt.BitFit(), adapter, seed=seed), seed)
    gt.activate(model, None)
    expected: dict[str, Tensor] = {}
    for adapter in "ab":
        with gt.using(model, adapter):
            expected[adapter] = logits(model, INPUTS)
    gate = threading.Barrier(2)

    def meet(*_: Any) -> None:
        with contextlib.suppress(threading.BrokenBarrierError):
            gate.wait(0.5)  # both are inside the host now, if it lets them

    handle = model.get_submodule(name).register_forward_pre_hook(meet)
    found: dict[str, Tensor] = {}

    def serve(adapter: str) -> None:
        with gt.using(model, adapter):
            found[adapter] = logits(model, INPUTS)

    threads = [threading.Thread(target=serve, args=(adapter,)) for adapter in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    handle.remove()
    assert {n: torch.equal(found[n], expected[n]) for n in "ab"} == {"a": True, "b": True}


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_a_thread_that_stops_inside_a_host_lets_the_others_in(error: type[BaseException]) -> None:
    model = FAMILIES["bert"].build()
    shake(gt.attach(model, gt.BitFit(), "a"), seed=1)
    expected = logits(model, INPUTS)

    def stop(*_: Any) -> None:
        raise error

    handle = model.classifier.register_forward_pre_hook(stop)
    with pytest.raises(error), gt.using(model, "a"):
        logits(model, INPUTS)
    handle.remove()
    found: list[Tensor] = []

    def serve() -> None:
        with gt.using(model, "a"):
            found.append(logits(model, INPUTS))

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    assert torch.equal(found[0], expected)
