"""ReFT: its equations, where it acts, how it starts, what it trains."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import graftune as gt
from graftune.errors import AdapterError, AnatomyError, SettingsError
from graftune.methods.reft import orthonormal
from graftune.sites import masks
from tests.contract.subjects import logits, shake
from tests.families import FAMILIES
from tests.methods.changes import check_uniform, learns

METHODS = {"LoReFT": gt.LoReFT, "NoReFT": gt.NoReFT, "DiReFT": gt.DiReFT}
BLOCK = "model.layers.1"


def attached(method: Any, family: str = "llama", noise: float = 0.3) -> tuple[Any, gt.Adapter]:
    model = FAMILIES[family].build()
    adapter = gt.attach(model, method, "task", seed=0)
    shake(adapter, 1, noise)
    return model, adapter


def delta_of(method: Any, noise: float = 0.3) -> Any:
    """Returns the delta of one block."""
    return attached(method, noise=noise)[0].get_submodule(BLOCK).deltas["task"]


def plain(name: str, own: dict[str, Tensor], h: Tensor, phi: Any = lambda z: z) -> Tensor:
    """Returns h at one token, `(d,)`, changed, row of R by row."""
    basis, W, b = own["basis"], own["W"], own["b"]
    R = [row.clone() for row in basis]
    if name == "LoReFT":  # Gram and Schmidt
        for at, row in enumerate(R):
            for other in R[:at]:
                row -= (row @ other) * other
            row /= row.norm()
    new = h.clone()
    for at, row in enumerate(R):
        moved = phi(W[at] @ h + b[at])
        if name != "DiReFT":
            moved = moved - row @ h
        new += moved * row
    return new


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("phi", ["identity", "relu"])
@pytest.mark.parametrize("name", METHODS)
def test_the_first_and_last_tokens_are_changed_by_the_equation(
    name: str, phi: str, tied: bool
) -> None:
    method = METHODS[name](
        r=3, prefix_positions=2, suffix_positions=1, tied=tied, activation=phi, init="paper"
    )
    delta = delta_of(method)
    own = {name: dict(unit.state_dict()) for name, unit in delta.named_children()}
    first, last = (own["both"],) * 2 if tied else (own["first"], own["last"])
    h = torch.randn(2, 6, 32)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
    expected = h.clone()
    for row, token, unit in (
        *((0, 0, first), (0, 1, first), (0, 5, last)),
        *((1, 2, first), (1, 3, first), (1, 5, last)),
    ):
        act = torch.relu if phi == "relu" else (lambda z: z)
        expected[row, token] = plain(name, unit, h[row, token], act)
    with masks.seen_as(masks.Noted({"decoder": mask})):
        found = delta(h, None)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)
    assert torch.equal(found[0, 2:5], h[0, 2:5])


def test_it_acts_on_what_the_block_answers() -> None:
    model, _ = attached(gt.DiReFT(prefix_positions=1))
    block, seen = model.get_submodule(BLOCK), {}
    for name in (None, "task"):
        with gt.using(model, name):
            handle = block.register_forward_hook(lambda *c, n=name: seen.update({n: c[2].clone()}))
            with torch.no_grad():
                model(**FAMILIES["llama"].inputs())
            handle.remove()
    differs = (seen[None] - seen["task"]).abs().amax((0, 2)) > 1e-4
    assert differs.tolist()[0]
    alone = gt.attach(model, gt.DiReFT(prefix_positions=1, layers=1), "last", seed=3)
    shake(alone, 2, noise=0.3)
    with gt.using(model, "last"), torch.no_grad():
        handle = block.register_forward_hook(lambda *c: seen.update(last=c[2].clone()))
        model(**FAMILIES["llama"].inputs())
        handle.remove()
    assert torch.equal(seen["last"][:, 1:], seen[None][:, 1:])
    expected = block.deltas["last"](seen[None], None)
    torch.testing.assert_close(seen["last"], expected)


@pytest.mark.parametrize("shape", [(1, 5), (4, 32), (8, 8)])
def test_rows_are_orthonormal_and_stay_what_they_are_if_they_were(
    shape: tuple[int, int],
) -> None:
    R = orthonormal(torch.randn(shape, dtype=torch.float64))
    eye = torch.eye(shape[0], dtype=torch.float64)
    torch.testing.assert_close(R @ R.mT, eye)
    torch.testing.assert_close(orthonormal(R), R)
    lower = torch.randn(shape[0], shape[0], dtype=torch.float64).tril(-1) + 2 * eye
    torch.testing.assert_close(orthonormal(lower @ R), R)


def test_gradients_go_through_orthonormal_rows() -> None:
    basis = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(orthonormal, (basis,))


@pytest.mark.parametrize("init", ["identity", "paper"])
@pytest.mark.parametrize("name", METHODS)
def test_initial_values(name: str, init: str) -> None:
    for unit in delta_of(METHODS[name](r=16, init=init, suffix_positions=1), noise=0).children():
        R = unit.R()
        if name == "LoReFT":
            torch.testing.assert_close(R @ R.mT, torch.eye(16), atol=1e-5, rtol=0)
        else:
            check_uniform(unit.basis, 32, within=0.1)
        if init == "paper":
            check_uniform(unit.W, 32, within=0.1)
            assert 0 < unit.b.abs().max() <= 1 / math.sqrt(32)
            continue
        assert torch.equal(unit.W, torch.zeros_like(R) if name == "DiReFT" else R)
        assert not unit.b.any()


def test_units_start_apart_and_the_papers_start_is_not_the_bases() -> None:
    model, adapter = attached(gt.LoReFT(suffix_positions=1, init="paper"), noise=0)
    bases = [t for n, t in adapter.state_dict().items() if n.endswith(".basis")]
    assert len(bases) == 4
    assert all(not torch.equal(one, other) for one in bases for other in bases if one is not other)
    inputs = FAMILIES["llama"].inputs()
    with gt.using(model, None):
        base = logits(model, inputs)
    assert not torch.allclose(logits(model, inputs), base, atol=1e-3)


@pytest.mark.parametrize("name", METHODS)
def test_directions_stay_orthonormal_in_training_and_all_is_trained(name: str) -> None:
    model, adapter = attached(METHODS[name](suffix_positions=2), noise=0)
    start = {n: t.clone() for n, t in adapter.named_parameters()}
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.05, weight_decay=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        model(**FAMILIES["llama"].inputs()).logits.square().mean().backward()
        optimizer.step()
    assert all(not torch.equal(t, start[n]) for n, t in adapter.named_parameters())
    R = model.get_submodule(BLOCK).deltas["task"].first.R()
    assert torch.allclose(R @ R.mT, torch.eye(4), atol=1e-5) == (name == "LoReFT")


@pytest.mark.parametrize("name", METHODS)
def test_training_learns(name: str) -> None:
    first, last = learns(METHODS[name]())
    assert last < 0.5 * first


def test_dropout_is_of_the_whole_changed_token() -> None:
    delta = delta_of(gt.LoReFT(prefix_positions=2, dropout=0.5))
    h = torch.full((4, 5, 32), 3.0)
    assert torch.equal(delta(h, None), delta(h, None))
    delta.train()
    torch.manual_seed(0)
    found = delta(h, None)
    share = (found[:, :2] == 0).float().mean().item()
    assert 0.35 < share < 0.65
    assert torch.equal(found[:, 2:], h[:, 2:])


@pytest.mark.parametrize(
    ("settings", "units"),
    [
        ({}, ["first"]),
        ({"suffix_positions": 2}, ["first", "last"]),
        ({"prefix_positions": 0, "suffix_positions": 2}, ["last"]),
        ({"suffix_positions": 2, "tied": True}, ["both"]),
        ({"tied": True}, ["both"]),
    ],
)
def test_there_is_an_intervention_where_there_are_tokens(settings: Any, units: Any) -> None:
    model, adapter = attached(gt.LoReFT(**settings), noise=0)
    assert list(dict(model.get_submodule(BLOCK).deltas["task"].named_children())) == units
    expected = 2 * len(units) * (2 * 4 * 32 + 4)
    assert adapter.count() == adapter.method.count(model, gt.anatomy(model)) == expected
    names = [f"{BLOCK}.adapter.{unit}.{t}" for unit in units for t in ("basis", "W", "b")]
    assert [name for name in adapter.state_dict() if BLOCK in name] == names


def test_blocks_are_chosen_and_dropped() -> None:
    model, adapter = attached(gt.LoReFT(layers=[1, 2]), "t5")
    assert {graft.place.module for graft in adapter.grafts} == {
        "encoder.block.1",
        "decoder.block.0",
    }
    inputs = FAMILIES["t5"].inputs()
    with gt.using(model, None):
        base = logits(model, inputs)
    gt.activate(model, "task", drop=1)  # the encoder's second is left
    assert not torch.equal(logits(model, inputs), base)
    gt.activate(model, "task", drop=2)
    assert torch.equal(logits(model, inputs), base)


def test_swin_has_a_width_for_each_stage() -> None:
    _, adapter = attached(gt.LoReFT(), "swin")
    assert adapter.method.count(adapter.model, adapter.anatomy) == sum(
        2 * (8 * width + 4) for width in (16, 32)
    )


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: gt.LoReFT(r=0), "LoReFT: r is 0, expected at least 1"),
        (lambda: gt.NoReFT(prefix_positions=-1), "prefix_positions is -1, expected at least 0"),
        (lambda: gt.DiReFT(prefix_positions=0), "no token is changed: set one of them"),
        (lambda: gt.LoReFT(dropout=1.0), "dropout is 1.0, expected between 0 and 1"),
        (lambda: gt.LoReFT(activation="rleu"), 'Did you mean "relu"'),
        (lambda: gt.LoReFT(init="zero"), "init is 'zero', expected one of identity, paper"),
    ],
)
def test_wrong_settings_are_refused(make: Any, words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        make()


def test_more_directions_than_features_are_refused() -> None:
    model = FAMILIES["swin"].build()
    for method in (gt.LoReFT(r=17), gt.DiReFT(r=17, orthogonal=True)):
        with pytest.raises(SettingsError, match=r"r is 17, .* has 16 features.*take at most 16"):
            gt.attach(model, method)
    assert gt.adapters(model) == {}
    gt.attach(model, gt.NoReFT(r=17))


def test_a_model_without_blocks_is_refused() -> None:
    model = FAMILIES["llama"].build()
    parts = dataclasses.replace(gt.anatomy(model), stacks=())
    with pytest.raises(AnatomyError, match=r"what blocks answer, and in this llama none were"):
        gt.LoReFT().plan(model, parts)


def test_it_cannot_be_merged() -> None:
    model, _ = attached(gt.LoReFT())
    with pytest.raises(AdapterError, match="can't be merged"):
        gt.merge(model, "task")


def test_the_papers_direft_is_free_and_its_authors_codes_orthonormal() -> None:
    assert not gt.DiReFT().is_orthonormal
    unit = next(delta_of(gt.DiReFT(orthogonal=True)).children())
    torch.testing.assert_close(unit.R() @ unit.R().mT, torch.eye(4), atol=1e-5, rtol=0)
