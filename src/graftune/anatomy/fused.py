"""Which rows of a fused projection belong to which role.

Rows are output features: rows of a Linear's weight, columns of a Conv1D's, and of 3-D expert
weights the dimension that is the output of the map.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from graftune.anatomy import table
from graftune.anatomy.names import QKV
from graftune.anatomy.parts import Projection, Role

if TYPE_CHECKING:
    from torch import nn

    from graftune.anatomy.spans import BlockView

Rows = tuple[tuple[int, int], ...]


def split_attention(
    path: str,
    roles: tuple[Role, ...],
    outputs: int,
    head_inputs: int | None,
    core: nn.Module,
    view: BlockView,
) -> list[Projection]:
    """Returns one projection per role of an attention's input linear.

    `head_inputs` is the width of all heads together (the output linear's input), which with grouped
    queries tells queries from keys and values.
    """
    if len(roles) == 1:
        return [Projection(roles[0], path)]
    order = table.INTERLEAVED.get(view.model_type)
    if order and roles == QKV:
        rows = _per_head(order, outputs, _heads(core, view.config))
        return [Projection(role, path, rows=rows[role], layout="interleaved") for role in roles]
    sizes = _sizes(roles, outputs, head_inputs)
    rows = _runs(roles, sizes)
    return [Projection(role, path, rows=rows[role], layout="contiguous") for role in roles]


def _sizes(roles: tuple[Role, ...], outputs: int, head_inputs: int | None) -> list[int]:
    if roles == QKV and head_inputs is not None and head_inputs < outputs:
        return [head_inputs, *[(outputs - head_inputs) // 2] * 2]
    return [outputs // len(roles)] * len(roles)


def _runs(roles: tuple[Role, ...], sizes: list[int]) -> dict[Role, Rows]:
    rows: dict[Role, Rows] = {}
    start = 0
    for role, size in zip(roles, sizes, strict=True):
        rows[role] = ((start, start + size),)
        start += size
    return rows


def _per_head(order: tuple[Role, ...], outputs: int, heads: int) -> dict[Role, Rows]:
    size = outputs // (heads * len(order))
    return {
        role: tuple(
            (start, start + size) for start in range(place * size, outputs, len(order) * size)
        )
        for place, role in enumerate(order)
    }


def _heads(core: nn.Module, config: Any) -> int:
    """Returns the number of heads, from the attention module or else the config."""
    names = ("num_heads", "num_attention_heads", "n_head", "n_heads")
    for owner in (core, getattr(core, "config", None), config):
        for name in names:
            value = getattr(owner, name, None)
            if isinstance(value, int):
                return value
    return 1


def split_feed_forward(
    path: str,
    roles: tuple[Role, ...],
    shape: tuple[int, ...],
    linears: dict[str, tuple[int, int]],
    model_type: str,
    parameter: str = "weight",
) -> list[Projection]:
    """Returns one projection per role of a feed-forward's linear or 3-D parameter."""
    if len(roles) < 2:
        return [Projection(role, path, parameter) for role in roles]
    outputs = shape[1]
    half = outputs // 2
    rows = _runs(roles, [half, outputs - half])
    return [Projection(role, path, parameter, rows[role], "contiguous") for role in roles]
