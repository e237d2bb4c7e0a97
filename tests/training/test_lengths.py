from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from graftune.training.lengths import LengthBatches, PadToLongest, token_lengths


def padded(lengths: list[int], order: list[int], size: int) -> int:
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    return sum(max(lengths[i] for i in batch) * len(batch) for batch in batches)


def lognormal(count: int = 800) -> list[int]:
    draw = torch.Generator().manual_seed(0)
    normal = torch.randn(count, generator=draw)
    return (18 * (0.6 * normal).exp()).clamp(4, 96).long().tolist()


@given(
    st.lists(st.integers(0, 50), max_size=70),
    st.integers(1, 9),
    st.integers(0, 5),
    st.integers(0, 3),
)
def test_every_example_comes_once(lengths: list[int], size: int, seed: int, epoch: int) -> None:
    order = LengthBatches(lengths, size, seed=seed, bucket=2)
    order.set_epoch(epoch)
    assert sorted(order) == list(range(len(lengths)))
    assert len(order) == len(lengths)


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    lengths = lognormal(100)
    first = LengthBatches(lengths, 8, seed=3)
    first.set_epoch(2)
    torch.manual_seed(7)
    again = LengthBatches(lengths, 8, seed=3)
    again.set_epoch(2)
    assert list(first) == list(again) == list(again)
    again.set_epoch(3)
    assert list(first) != list(again)
    assert list(first) != list(LengthBatches(lengths, 8, seed=4))


def test_nothing_is_taken_from_the_global_random_state() -> None:
    before = torch.get_rng_state()
    list(LengthBatches(lognormal(50), 4))
    assert torch.equal(before, torch.get_rng_state())


def test_much_less_is_padded_than_in_random_order() -> None:
    lengths = lognormal()
    ours = padded(lengths, list(LengthBatches(lengths, 16)), 16)
    random = padded(lengths, torch.randperm(len(lengths)).tolist(), 16)
    assert ours < 0.55 * random
    assert ours < 1.12 * sum(lengths)


def test_as_little_is_padded_as_by_transformers_own_grouping() -> None:
    from transformers.trainer_pt_utils import LengthGroupedSampler

    lengths = lognormal()
    ours = padded(lengths, list(LengthBatches(lengths, 16)), 16)
    theirs = padded(lengths, list(LengthGroupedSampler(16, lengths=lengths)), 16)
    assert ours < 1.02 * theirs


def test_the_longest_batch_comes_first_and_the_short_batch_last() -> None:
    lengths = lognormal(101)
    order = list(LengthBatches(lengths, 10))
    assert max(lengths[i] for i in order[:10]) == max(lengths[i] for i in order[:100])
    short = LengthBatches([1] * 7, 3)
    assert len(list(short)) == 7


@pytest.mark.parametrize(("size", "bucket"), [(0, 1), (1, 0)])
def test_sizes_below_one_are_refused(size: int, bucket: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        LengthBatches([1], size, bucket=bucket)


class Unsized:
    pass


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        ([{"input_ids": [1, 2]}, {"input_ids": [3]}], [2, 1]),
        (Dataset.from_dict({"input_ids": [[1, 2, 3], [4]], "label": [0, 1]}), [3, 1]),
        (Dataset.from_dict({"pixels": [[1.0]]}), None),
        ([{"pixels": [1.0]}], None),
        ([torch.zeros(2)], None),
        ([], None),
        (Unsized(), None),
    ],
)
def test_lengths_are_found_where_examples_have_tokens(dataset: object, expected: object) -> None:
    assert token_lengths(dataset) == expected


def test_a_data_sets_own_lengths_are_taken() -> None:
    dataset = Unsized()
    dataset.lengths = [4, 5]  # type: ignore[attr-defined]
    assert token_lengths(dataset) == [4, 5]


def test_padding_reaches_the_longest_of_the_batch_on_the_side_asked() -> None:
    rows = [
        {"input_ids": [1, 2, 3], "token_type_ids": [0, 1, 1], "labels": [1, 2, 3], "weight": 0.5},
        {"input_ids": [4], "token_type_ids": [1], "labels": [4], "weight": 1.5},
    ]
    right = PadToLongest(9)(rows)
    assert right["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert right["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert right["token_type_ids"].tolist() == [[0, 1, 1], [1, 0, 0]]
    assert right["labels"].tolist() == [[1, 2, 3], [4, -100, -100]]
    assert right["weight"].tolist() == [0.5, 1.5]
    left = PadToLongest(9, side="left")(rows)
    assert left["input_ids"].tolist() == [[1, 2, 3], [9, 9, 4]]
    assert left["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]


def test_images_and_tensors_are_put_together_too() -> None:
    rows = [{"pixel_values": torch.zeros(3, 4, 4), "input_ids": torch.tensor([1]), "label_ids": 2}]
    batch = PadToLongest()(rows)
    assert batch["pixel_values"].shape == (1, 3, 4, 4)
    assert batch["input_ids"].tolist() == [[1]]
    assert batch["labels"].tolist() == [2]
