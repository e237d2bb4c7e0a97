"""Finds a block's feed-forward among the linears and 3-D parameters that attention leaves."""

from __future__ import annotations

from graftune.anatomy import names, table
from graftune.anatomy.drafts import BlockView, Draft, named
from graftune.anatomy.fused import split_feed_forward
from graftune.anatomy.modules import common, leaf, parent, within
from graftune.anatomy.parts import Projection, Role

Linears = dict[str, tuple[int, int]]


def find_feed_forward(view: BlockView, attentions: list[Draft]) -> Draft | None:
    """Returns the draft of the block's feed-forward (experts and shared ones together), or None."""
    linears = _left(view, attentions)
    width = view.linears[attentions[0].modules[0]][0] if attentions else None
    projections = _experts(view, width)
    has_experts = bool(projections)
    for path, shape in linears.items():
        roles = _roles(path, shape, linears, width)
        up_first = view.model_type in table.UP_FIRST
        projections += split_feed_forward(
            path, _opened(path, roles, shape, linears, up_first), shape[1]
        )
    if not projections:
        return None
    projections.sort(key=lambda projection: view.tree.position[projection.module])
    draft = Draft("ffn", common([p.module for p in projections]), projections, has_experts)
    have = {projection.role for projection in projections}
    draft.missing += [
        f"{view.path}: no {role} projection of the feed-forward found"
        for role in ("up", "down")
        if role not in have
    ]
    return draft


def _left(view: BlockView, attentions: list[Draft]) -> Linears:
    taken = [draft.root for draft in attentions if draft.root != view.path]
    used = {path for draft in attentions for path in draft.modules}
    return {
        path: shape
        for path, shape in view.linears.items()
        if path not in used and not any(within(path, root) for root in taken)
    }


def _roles(
    path: str, shape: tuple[int, int], linears: Linears, width: int | None
) -> tuple[Role, ...]:
    name, home = leaf(named(path)), parent(named(path))
    if name in ("w1", "w_1", "v1"):
        return ("gate",) if f"{home}.w3" in linears else ("up",)
    known = names.roles_of(name, names.FEED_FORWARD)
    if known or not (name == "dense" or name.isdigit()):
        return known
    if leaf(home) == "intermediate" or (width == shape[0] and shape[1] > shape[0]):
        return ("up",)
    return ("down",) if leaf(home) == "output" or width == shape[1] else ()


def _opened(
    path: str, roles: tuple[Role, ...], shape: tuple[int, int], linears: Linears, up_first: bool
) -> tuple[Role, ...]:
    """Returns the roles in the module's order: both gate and up where it is twice as wide."""
    if "up" not in roles:
        return roles
    home = parent(named(path))
    readers = [other[0] for at, other in linears.items() if at != path and within(at, home)]
    doubled = any(shape[1] == 2 * size for size in readers) and shape[1] not in readers
    if not doubled:
        return ("up",)
    return ("up", "gate") if up_first else ("gate", "up")


def _experts(view: BlockView, width: int | None) -> list[Projection]:
    """Returns the projections kept as 3-D parameters, one slice per expert."""
    found: list[Projection] = []
    for module, shapes in view.tree.experts.items():
        turned = bool(getattr(view.tree.modules[module], "is_transposed", False))
        for name, shape in shapes.items():
            word = leaf(module) if name == "weight" else name.removesuffix("_weight")
            roles = names.roles_of(word, names.FEED_FORWARD)
            transposed = turned or shape[1] == width != shape[2]
            outputs = shape[2] if transposed and "up" in roles else shape[1]
            every_other = view.model_type in table.EVERY_OTHER_ROW
            found += split_feed_forward(module, roles, outputs, name, every_other)
    return found
