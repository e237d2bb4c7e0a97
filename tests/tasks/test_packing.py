"""Packed conversations: each trains as it does alone, and what can't do so is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import graftune as gt
from graftune.errors import TrainingError
from graftune.tasks import packing
from graftune.tasks.batches import collator
from graftune.tasks.chat import IGNORED
from graftune.tasks.task import Ready
from tests.contract.subjects import shake
from tests.families import FAMILIES


class Tokenizer:
    pad_token_id = 0


def ready(family: str, method: Any = None, **settings: Any) -> Ready:
    """Returns a tiny decoder with an adapter that has learnt something."""
    model = FAMILIES[family].build(**settings)
    shake(gt.attach(model, method or gt.LoRA(r=2, targets="all-linear"), "x"), seed=1, noise=0.1)
    return Ready(model, Tokenizer(), [], 64)  # type: ignore[arg-type]


def texts(*sizes: int) -> list[dict[str, Any]]:
    """Returns texts whose first half is a question, which isn't learnt."""
    draw = torch.Generator().manual_seed(0)
    found: list[dict[str, Any]] = []
    for size in sizes:
        ids = torch.randint(5, 40, (size,), generator=draw).tolist()
        found.append({"input_ids": ids, "labels": [IGNORED] * (size // 2) + ids[size // 2 :]})
    return found


def losses(found: Ready, batch: dict[str, Any]) -> list[list[float]]:
    """Returns the loss of each label of each row, in order."""
    labels = batch.pop("labels")
    with torch.no_grad():
        said = found.model(**batch).logits[:, :-1].transpose(1, 2)
    each = torch.nn.functional.cross_entropy(said, labels[:, 1:], reduction="none")
    return [row[at[1:] != IGNORED].tolist() for row, at in zip(each, labels, strict=True)]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    ("family", "method"),
    [("llama", None), ("gpt2", None), ("qwen3", None), ("llama", gt.PrefixTuning(length=3))],
)
def test_each_text_has_the_losses_that_it_has_alone(
    family: str, method: Any, attention: str
) -> None:
    found = ready(family, method, attn_implementation=attention)
    rows = packing.pack(texts(9, 8, 7, 5, 3, 2), 16)
    assert [len(row["input_ids"]) for row in rows] == [16, 16, 2]
    plain = collator(found)
    batch = packing.collator(plain)(rows)
    assert "attention_mask" not in batch
    together = losses(found, batch)
    alone = {
        tuple(one["input_ids"]): losses(found, plain([one]))[0] for one in texts(9, 8, 7, 5, 3, 2)
    }
    for row, seen in zip(rows, together, strict=True):
        starts = [at for at, position in enumerate(row["position_ids"]) if position == 0]
        parts = [row["input_ids"][a:b] for a, b in zip(starts, [*starts[1:], None], strict=True)]
        expected = [loss for part in parts for loss in alone[tuple(part)]]
        assert seen == pytest.approx(expected, abs=1e-5)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=30), st.integers(1, 25))
def test_every_text_is_packed_once_and_whole(sizes: list[int], limit: int) -> None:
    given_texts = texts(*sizes)
    rows = packing.pack(given_texts, limit)
    parts: list[tuple[int, ...]] = []
    for row in rows:
        assert len(row["input_ids"]) <= max(limit, *sizes)
        starts = [at for at, position in enumerate(row["position_ids"]) if position == 0]
        assert all(row["labels"][at] == IGNORED for at in starts)
        parts += [
            tuple(row["input_ids"][a:b]) for a, b in zip(starts, [*starts[1:], None], strict=True)
        ]
    assert sorted(parts) == sorted(tuple(one["input_ids"]) for one in given_texts)


@pytest.mark.parametrize(
    "method",
    [
        gt.LoRA(r=2),
        gt.PfeifferAdapter(reduction=4),
        gt.BitFit(),
        gt.IA3(),
        gt.FullFineTuning(),
        gt.PrefixTuning(length=3),
    ],
    ids=lambda method: type(method).__name__,
)
def test_what_acts_on_each_token_passes_the_trial_and_stays_as_it_was(method: Any) -> None:
    found = ready("gpt2", method)
    adapter = gt.adapters(found.model)["x"]
    before = [one.detach().clone() for one in adapter.parameters()]
    packing.check(found, adapter, collator(found))
    assert all(torch.equal(a, b) for a, b in zip(before, adapter.parameters(), strict=True))


def test_a_method_that_acts_on_the_row_is_refused() -> None:
    found = ready("llama", gt.PromptTuning(length=3))
    with pytest.raises(TrainingError, match=r"see each other: leave packing out"):
        packing.check(found, gt.adapters(found.model)["x"], collator(found))


def test_a_model_without_positions_is_refused() -> None:
    found = ready("bloom")
    with pytest.raises(TrainingError, match=r"train\.packing"):
        packing.check(found, gt.adapters(found.model)["x"], collator(found))
