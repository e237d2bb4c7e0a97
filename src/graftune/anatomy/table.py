"""What structure can't tell, per model type. Everything else is discovered; keep this small.

Tests check the entries against the models' own code: orders by tracing a forward, layouts by
splitting a module's output as the model does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from graftune.anatomy.parts import Order, Role


def _by(setting: str, yes: Order, no: Order) -> Callable[[Any], Order]:
    def choose(config: Any) -> Order:
        return yes if getattr(config, setting, True) else no

    return choose


ORDERS: dict[str, Order | Callable[[Any], Order]] = {
    "bart": "post",
    "distilbert": "post",
    "gpt_neox": _by("use_parallel_residual", "parallel", "pre"),
    "opt": _by("do_layer_norm_before", "pre", "post"),
}
"""Where norms sit, for types whose names and counts of norms mislead or don't say."""

INTERLEAVED: dict[str, tuple[Role, ...]] = {
    "bloom": ("query", "key", "value"),
    "gpt_neox": ("query", "key", "value"),
}
"""Types whose fused attention orders its rows head by head, with the order within a head."""

ADDS_RESIDUAL = frozenset({"bloom"})
"""Types whose attention and feed-forward modules take the residual and add it themselves."""

PRETRAINED_HEADS: dict[str, tuple[str, ...]] = {"modernbert": ("head",)}
"""Modules outside the body that a task class takes over from pretraining."""
