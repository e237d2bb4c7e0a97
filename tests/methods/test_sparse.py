"""Sparse changes: where they lie, what they add, how the largest entries are chosen."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import graftune as gt
from graftune.errors import FormatError, SettingsError
from graftune.formats.tensors import read_tensors, write_tensors
from graftune.methods._sparse import (
    BLOCK,
    SparseChange,
    budget,
    check_budget,
    largest,
    spread,
)
from tests.contract.subjects import shake
from tests.families import FAMILIES

PLACES: list[tuple[int, list[int]]] = [
    (10, [0, 3, 9]),
    (10, []),
    (BLOCK, [0, BLOCK - 1]),
    (BLOCK + 1, [BLOCK]),
    (5 * BLOCK, [32767, 32768, BLOCK - 1, BLOCK, 4 * BLOCK, 5 * BLOCK - 1]),
]


def change(size: int, at: list[int], seed: int = 0) -> SparseChange:
    values = torch.randn(len(at), generator=torch.Generator().manual_seed(seed))
    return SparseChange.at(torch.tensor(at, dtype=torch.int64), values, size)


@pytest.mark.parametrize(("size", "at"), PLACES)
def test_positions_are_those_given(size: int, at: list[int]) -> None:
    delta = change(size, at)
    assert delta.positions().tolist() == at
    assert delta.blocks.shape == (-(-size // BLOCK),)
    assert delta.changes(size) == len(at)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("size", "at"), PLACES)
def test_values_are_added_at_the_positions_and_nowhere_else(
    size: int, at: list[int], dtype: torch.dtype
) -> None:
    base = torch.randn(size, generator=torch.Generator().manual_seed(1)).to(dtype)
    delta = change(size, at)
    expected = base.clone()
    for position, value in zip(at, delta.values.tolist(), strict=True):
        expected[position] = (base[position].float() + torch.tensor(value)).to(dtype)
    assert torch.equal(delta(base, base), expected)
    assert delta(base, base).dtype == dtype


def test_only_the_values_get_a_gradient_that_of_their_entries() -> None:
    base, delta = torch.randn(4, 5), change(20, [1, 7, 19])
    out = delta(base, base)
    weights = torch.randn(4, 5)
    (out * weights).sum().backward()
    assert torch.equal(delta.values.grad, weights.flatten()[[1, 7, 19]])


def test_below_another_change_its_gradient_passes() -> None:
    base, delta = torch.randn(4, 5), change(20, [1, 7, 19])
    before = base.clone().requires_grad_()
    delta(before, base).sum().backward()
    assert torch.equal(before.grad, torch.ones(4, 5))


def test_an_entry_takes_six_bytes() -> None:
    delta = change(BLOCK, list(range(0, BLOCK, 200)))
    size = sum(tensor.nbytes for tensor in delta.state_dict().values())
    assert size == 6 * len(delta.values) + 4


@pytest.mark.parametrize(
    ("keep", "size", "expected"),
    [(0.005, 335_141_888, 1_675_709), (0.29, 100, 29), (1, 7, 7), (0.5, 7, 3), (1e-4, 9_999, 0)],
)
def test_the_budget_is_exactly_the_floor(keep: float, size: int, expected: int) -> None:
    assert budget(keep, size) == expected


def test_less_than_one_entry_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"keep=0.0001 of 9,999 .*keep at least 0.0001"):
        check_budget("FishMask", 1e-4, 9_999)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("count", [1, 5, 17, 30])
def test_the_largest_are_those_of_a_stable_sort(seed: int, count: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    scores = [torch.randint(0, 4, shape, generator=draw).float() for shape in ((3, 4), (1,), (17,))]
    together = torch.cat([score.flatten() for score in scores])
    order = torch.sort(together, descending=True, stable=True).indices[:count]
    expected = torch.zeros(30, dtype=torch.bool)
    expected[order] = True
    found = largest(lambda: scores, count)
    assert sum(len(at) for at in found) == count
    for at, mask in zip(found, expected.split([12, 1, 17]), strict=True):
        assert at.tolist() == mask.nonzero().flatten().tolist()


@pytest.mark.parametrize(("sizes", "count"), [([10, 1, 300], 31), ([5, 5], 10), ([7, 2, 1], 1)])
def test_placeholders_are_as_many_and_each_once(sizes: list[int], count: int) -> None:
    found = spread(sizes, count)
    assert sum(len(at) for at in found) == count
    for size, at in zip(sizes, found, strict=True):
        assert len(set(at.tolist())) == len(at)
        assert not len(at) or 0 <= int(at.min()) <= int(at.max()) < size


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Returns the folder of a sparse adapter of the tiny BERT."""
    adapter = gt.attach(FAMILIES["bert"].build(), gt.DiffPruning(keep=0.05))
    shake(adapter, seed=1)
    adapter.finish()
    return adapter.save(tmp_path / "a")


@pytest.mark.parametrize("broken", ["count", "range", "order", "negative", "lost"])
def test_positions_that_do_not_lie_in_the_tensor_are_refused(saved: Path, broken: str) -> None:
    file = saved / "adapter_model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in read_tensors(file).items()}
    name = next(n for n in tensors if n.endswith("word_embeddings.weight.values"))
    index, blocks = (tensors[name.replace("values", part)] for part in ("index", "blocks"))
    if broken == "count":
        blocks += 1
    elif broken == "range":
        index[-1] = -1  # 65,535
    elif broken == "order":
        index[0] = index[1]
    elif broken == "negative":
        blocks -= 2 * len(index)
    else:
        del tensors[name]
    write_tensors(file, tensors)
    words = "1 missing" if broken == "lost" else "don't lie in a tensor of .* entries"
    model = FAMILIES["bert"].build()
    with pytest.raises(FormatError, match=words):
        gt.load(model, saved)
    assert gt.adapters(model) == {}


def test_what_is_saved_sparse_is_loaded_bit_for_bit(saved: Path) -> None:
    model = FAMILIES["bert"].build()
    adapter = gt.load(model, saved)
    again: dict[str, Tensor] = read_tensors(saved / "adapter_model.safetensors")
    assert all(
        torch.equal(again[f"base_model.model.{n}"], t) for n, t in adapter.state_dict().items()
    )
    assert any(n.endswith(".index") for n in adapter.state_dict())
