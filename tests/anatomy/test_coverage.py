"""How many of transformers' model types are understood; a new version that breaks names is seen."""

from __future__ import annotations

import pytest

from graftune.anatomy import anatomy
from tests.anatomy.zoo import build, classes

WHOLE_AT_LEAST = 228
NOT_WHOLE = {
    "flaubert": "no feed-forward",
    "jetmoe": "no query projection",
    "rwkv": "no query projection",
    "squeezebert": "no list of blocks",
    "xlm": "no feed-forward",
    "xlnet": "no query, key and value",
    "zaya": "no value projection",
}
"""Types understood in part, and what is said to be missing."""


@pytest.mark.slow
def test_most_model_types_are_whole_and_the_others_say_what_is_missing() -> None:
    whole: list[str] = []
    lacking: dict[str, tuple[str, ...]] = {}
    for model_type, class_name in classes().items():
        try:
            model = build(model_type, class_name)
        except RuntimeError:
            continue
        found = anatomy(model)
        if found.missing:
            lacking[model_type] = found.missing
        else:
            whole.append(model_type)
            assert found.blocks, model_type
    assert set(lacking) <= set(NOT_WHOLE), lacking
    assert all(NOT_WHOLE[name] in lines[0] for name, lines in lacking.items())
    assert len(set(whole)) >= WHOLE_AT_LEAST, len(set(whole))
