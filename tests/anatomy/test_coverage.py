"""How many of transformers' model types are understood; a new version that breaks names is seen."""

from __future__ import annotations

import pytest

from graftune.anatomy import anatomy
from tests.anatomy.tracing import trace
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


TRACED_AT_LEAST = 130
NOT_IN_ONE_ORDER = {
    "fnet": "its Fourier mixing has no linears, so only the feed-forward is traced",
    "hrm_text": "runs its blocks in cycles",
    "mobilebert": "norms around bottlenecks as well",
    "pegasus_x": "its output linear runs twice per block, for global and for local tokens",
    "rwkv": "no attention",
    "zamba": "a shared block whose output enters a state-space layer",
}
"""Types whose forward shows something else than our word for it, and why that stays so."""


@pytest.mark.slow
def test_orders_are_those_of_the_forwards_that_run_on_the_meta_device() -> None:
    traced, differing = 0, {}
    for model_type, class_name in classes().items():
        try:
            model = build(model_type, class_name)
            model.config._attn_implementation = "eager"
            found = anatomy(model)
            shown = trace(model, found)
        except Exception:
            continue  # counted below: a forward needs numbers, or inputs of its own
        blocks = [b for b in found.blocks if b.path in shown and b.position > 0]
        traced += bool(blocks)
        orders = {(block.order, shown[block.path][0]) for block in blocks}
        if any(ours != theirs for ours, theirs in orders):
            differing[model_type] = orders
    assert set(differing) <= set(NOT_IN_ONE_ORDER), differing
    assert traced >= TRACED_AT_LEAST, traced


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
