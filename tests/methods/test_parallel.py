"""Parallel adapters: what they read, and that they start as the base."""

from __future__ import annotations

import pytest

import graftune as gt
from graftune.errors import SettingsError
from tests.families import FAMILIES
from tests.methods.changes import learns


def test_the_papers_settings_are_the_defaults() -> None:
    method = gt.ParallelAdapter()
    assert (method.sublayers, method.scale, method.reduction) == (("ffn",), 4.0, 2)
    assert (method.init, method.activation, method.reads) == ("zero-up", "relu", "input")


def test_it_reads_behind_the_norm_or_before_it() -> None:
    for reads, field in (("input", "input"), ("residual", "residual")):
        adapter = gt.attach(FAMILIES["llama"].build(), gt.ParallelAdapter(reads=reads))
        for graft in adapter.grafts:
            assert graft.delta.reads == {field}


def test_a_wrong_place_to_read_names_the_right_ones() -> None:
    with pytest.raises(SettingsError, match=r"reads is 'inputs', .* Did you mean \"input\""):
        gt.ParallelAdapter(reads="inputs")


def test_mixture_of_experts_are_read_as_a_whole() -> None:
    adapter = gt.attach(FAMILIES["mixtral"].build(), gt.ParallelAdapter())
    assert [n for n in adapter.state_dict() if n.endswith(".up")] == [
        f"model.layers.{i}.ffn.adapter.up" for i in range(2)
    ]


def test_training_learns() -> None:
    first, last = learns(gt.ParallelAdapter(), "llama")
    assert last < 0.8 * first
