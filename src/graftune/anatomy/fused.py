"""Which rows of a fused projection belong to which role.

Rows are output features: rows of a Linear's weight, columns of a Conv1D's, and of 3-D expert
weights the dimension that is the output of the map.
"""

from __future__ import annotations

from typing import Any

from graftune.anatomy import table
from graftune.anatomy.drafts import BlockView
from graftune.anatomy.modules import leaf
from graftune.anatomy.names import QKV
from graftune.anatomy.parts import Projection, Role

Rows = tuple[tuple[int, int], ...]


def split_attention(
    path: str, roles: tuple[Role, ...], heads_width: int | None, core: str, view: BlockView
) -> list[Projection]:
    """Returns one projection per role of an attention's input linear.

    `heads_width` is the width of all heads together (the output linear's input), which with grouped
    queries tells queries from keys and values.
    """
    if len(roles) == 1:
        return [Projection(roles[0], path)]
    outputs = view.linears[path][1]
    module = view.tree.modules[core]
    known = table.LAYOUTS.get("kv_b_proj" if leaf(path) == "kv_b_proj" else view.model_type)
    layout = known(Settings(module, view.config)) if known else None
    if layout:
        rows = _repeated(*layout, outputs)
        return [Projection(role, path, rows=rows[role], layout="interleaved") for role in roles]
    rows = _runs(roles, _sizes(roles, outputs, heads_width))
    return [Projection(role, path, rows=rows[role], layout="contiguous") for role in roles]


class Settings:
    """A module's settings: its own attributes, else its config's, else the model's."""

    def __init__(self, *owners: Any) -> None:
        self.owners = [*owners, *(getattr(owner, "config", None) for owner in owners)]

    def __call__(self, *names: str) -> int:
        """Returns the first of `names` that any owner has, 0 if none has."""
        found = (getattr(owner, name, None) for name in names for owner in self.owners)
        return next((int(value) for value in found if isinstance(value, int)), 0)


def head_size(attention: Any) -> int:
    """Returns the features of one of an attention's heads, 0 where it doesn't say."""
    names = ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim")
    return Settings(attention)(*names)


def _sizes(roles: tuple[Role, ...], outputs: int, heads_width: int | None) -> list[int]:
    if roles == QKV and heads_width is not None and heads_width < outputs:
        return [heads_width, *[(outputs - heads_width) // 2] * 2]
    return [outputs // len(roles)] * len(roles)


def _runs(roles: tuple[Role, ...], sizes: list[int]) -> dict[Role, Rows]:
    rows: dict[Role, Rows] = {}
    start = 0
    for role, size in zip(roles, sizes, strict=True):
        rows[role] = ((start, start + size),)
        start += size
    return rows


def _repeated(groups: int, cell: tuple[tuple[Role, int], ...], outputs: int) -> dict[Role, Rows]:
    """Returns the rows of a layout that repeats `cell` (roles with relative sizes) per group."""
    unit = outputs // (max(groups, 1) * sum(size for _, size in cell))
    rows: dict[Role, list[tuple[int, int]]] = {role: [] for role, _ in cell}
    start = 0
    for _ in range(max(groups, 1)):
        for role, size in cell:
            rows[role].append((start, start + size * unit))
            start += size * unit
    return {role: tuple(ranges) for role, ranges in rows.items()}


def split_feed_forward(
    path: str,
    roles: tuple[Role, ...],
    outputs: int,
    parameter: str = "weight",
    every_other: bool = False,
) -> list[Projection]:
    """Returns one projection per role of a feed-forward's linear or 3-D parameter."""
    if len(roles) < 2:
        return [Projection(role, path, parameter) for role in roles]
    if every_other:
        rows = _repeated(outputs // 2, tuple((role, 1) for role in roles), outputs)
    else:
        rows = _runs(roles, [outputs // 2, outputs - outputs // 2])
    layout = "interleaved" if every_other else "contiguous"
    return [Projection(role, path, parameter, rows[role], layout) for role in roles]
