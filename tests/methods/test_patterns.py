"""Patterns that give modules other settings."""

from __future__ import annotations

from graftune.methods._patterns import value_for


def test_patterns_match_ends_of_names_in_order() -> None:
    patterns = {"layers.0.q": 1, r"\d+.q": 2, "^q": 3}
    assert value_for(patterns, "model.layers.0.q", 9) == 1
    assert value_for(patterns, "model.layers.7.q", 9) == 2
    assert value_for(patterns, "q", 9) == 3
    assert value_for(patterns, "model.layers.0.k", 9) == 9
    assert value_for(None, "q") is None
