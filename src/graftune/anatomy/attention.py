"""Finds a block's attentions: modules whose linears are named as queries, keys and values."""

from __future__ import annotations

from graftune.anatomy import names, table
from graftune.anatomy.drafts import BlockView, Draft, named
from graftune.anatomy.fused import split_attention
from graftune.anatomy.modules import leaf, parent, within
from graftune.anatomy.parts import Projection, Role

Inputs = list[tuple[str, tuple[Role, ...]]]
"""Linears of one attention that read its input, with the roles each holds."""


def find_attentions(view: BlockView) -> list[Draft]:
    """Returns a draft per attention of the block, in tree order."""
    inputs: dict[str, Inputs] = {}
    for path in view.linears:
        roles = _roles(path, view)
        if roles:
            inputs.setdefault(parent(named(path)), []).append((path, roles))
    cores = [
        core
        for core, linears in inputs.items()
        if within(core, view.path)
        and not any(core != other and within(core, other) for other in inputs)
        and {"query", "value"} & {role for _, roles in linears for role in roles}
    ]
    return [_attention(view, core, inputs[core]) for core in cores]


def _roles(path: str, view: BlockView) -> tuple[Role, ...]:
    own = table.NAMES.get(view.model_type, {})
    name = leaf(named(path))
    return own.get(name) or names.roles_of(name, names.ATTENTION)


def _attention(view: BlockView, core: str, inputs: Inputs) -> Draft:
    crosses = names.CROSS.search(view.below(core))
    draft = Draft("cross-attention" if crosses else "attention", core, [])
    output = _output(view, core, {path for path, _ in inputs})
    heads_width = view.linears[output][0] if output else None
    for path, roles in inputs:
        draft.projections += split_attention(path, roles, heads_width, core, view)
    if output:
        draft.projections.append(Projection("output", output))
    have = {projection.role for projection in draft.projections}
    if getattr(view.tree.modules[core], "is_kv_shared_layer", False):
        have |= {"key", "value"}
    lacking = [role for role in (*names.QKV, "output") if role not in have]
    draft.missing += [f"{core}: no {role} projection found" for role in lacking]
    return draft


def _output(view: BlockView, core: str, inputs: set[str]) -> str | None:
    """Returns the attention's output linear: in the core, else in a sibling such as BERT's."""
    homes = [core, parent(core)]
    for home in homes:
        if not within(home, view.path) or (home == view.path and core != view.path):
            continue
        candidates = [
            path
            for path in view.linears
            if within(path, home)
            and path not in inputs
            and names.OUTPUT.fullmatch(leaf(named(path)))
        ]
        exact = [path for path in candidates if parent(named(path)) == core]
        if candidates:
            return (exact or candidates)[0]
    return None
