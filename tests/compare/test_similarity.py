"""How alike prompts are, against sums written out; and what is averaged of them."""

from __future__ import annotations

import math

import pytest
import torch

from graftune.compare.similarity import (
    KINDS,
    ranking,
    similarity,
    task_embedding,
    weighted_average,
    weights,
)
from graftune.errors import SettingsError


def drawn(seed: int, m: int = 3, d: int = 5) -> torch.Tensor:
    return torch.randn(m, d, generator=torch.Generator().manual_seed(seed))


def cosine(a: list[float], b: list[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))


def test_a_task_is_the_mean_of_its_tokens() -> None:
    prompt = drawn(0)
    plain = [sum(row[i] for row in prompt.tolist()) / 3 for i in range(5)]
    assert task_embedding(prompt).tolist() == pytest.approx(plain, rel=1e-5)


def test_similarity_is_what_the_sums_say() -> None:
    one, other = drawn(1), drawn(2)
    means = [[sum(column) / 3 for column in zip(*p.tolist(), strict=True)] for p in (one, other)]
    assert similarity(one, other) == pytest.approx(cosine(*means), rel=1e-5)
    pairs = [cosine(a, b) for a in one.tolist() for b in other.tolist()]
    assert similarity(one, other, "pairs") == pytest.approx(sum(pairs) / 9, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_similarity_is_symmetric_blind_to_size_and_signed(kind: str) -> None:
    one, other = drawn(1), drawn(2)
    found = similarity(one, other, kind)
    assert similarity(other, one, kind) == pytest.approx(found, rel=1e-12)
    assert similarity(7 * one, other, kind) == pytest.approx(found, rel=1e-6)
    assert similarity(-one, other, kind) == pytest.approx(-found, rel=1e-6)


def test_a_prompt_is_like_itself_in_whatever_order() -> None:
    prompt = drawn(3)
    assert similarity(prompt, prompt) == pytest.approx(1, abs=1e-12)
    assert similarity(prompt, prompt[[2, 0, 1]]) == pytest.approx(1, abs=1e-6)
    assert similarity(prompt[:1], prompt[:1], "pairs") == pytest.approx(1, abs=1e-12)
    assert similarity(prompt.bfloat16(), prompt.bfloat16()) == pytest.approx(1, abs=1e-12)


def test_the_likest_source_comes_first() -> None:
    target = drawn(4)
    sources = {"far": -target, "near": target + 0.1 * drawn(5), "same": target, "other": drawn(6)}
    found = ranking(target, sources)
    assert list(found)[:2] == ["same", "near"]
    assert list(found)[-1] == "far"
    assert found["other"] == similarity(sources["other"], target)


def test_weights_are_shares_and_what_is_unlike_has_none() -> None:
    assert weights([0.9, 0.6, -0.3]) == pytest.approx([0.6, 0.4, 0])
    assert weights([0.123]) == [1.0]
    with pytest.raises(SettingsError, match=r"no source is like the target .*-0\.2"):
        weights([-0.2, 0.0])


def test_the_average_of_one_source_is_that_source_and_of_several_their_sum() -> None:
    one, other = drawn(7), drawn(8)
    assert torch.equal(weighted_average([one], weights([0.3])), one)
    found = weighted_average([one, other], [0.75, 0.25])
    assert torch.allclose(found, 0.75 * one + 0.25 * other)


def test_other_kinds_and_shapes_are_refused() -> None:
    with pytest.raises(SettingsError, match=r'similarity is "meen".*Did you mean "mean"'):
        similarity(drawn(0), drawn(1), "meen")
    with pytest.raises(SettingsError, match=r"\(3, 5\) and \(4, 5\)"):
        similarity(drawn(0), drawn(1, m=4))
