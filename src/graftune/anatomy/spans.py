"""Finds the attention and feed-forward spans of one block by names, then by shapes."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from graftune.anatomy import names
from graftune.anatomy.fused import split_attention, split_feed_forward
from graftune.anatomy.modules import Tree, common, is_router, leaf, parent, within
from graftune.anatomy.parts import Projection, Role, SpanKind


@dataclass
class Draft:
    """A span while its block is still being read."""

    kind: SpanKind
    core: str
    """The module that holds the projections; for attention, its inputs."""
    projections: list[Projection]
    experts: bool = False
    missing: list[str] = field(default_factory=list)

    @property
    def modules(self) -> list[str]:
        """Paths of the modules that hold the projections."""
        return [projection.module for projection in self.projections]

    @property
    def root(self) -> str:
        """Path of the smallest module that holds all of them."""
        return common([f"{path}.weight" for path in self.modules] if self.experts else self.modules)


@dataclass(frozen=True)
class BlockView:
    """One block of a model and what its model says of it."""

    tree: Tree
    """The tree of the block alone, with absolute paths."""
    path: str
    model_type: str
    config: Any

    @cached_property
    def linears(self) -> dict[str, tuple[int, int]]:
        """The block's linears, routers left out."""
        modules = self.tree.modules
        return {
            path: shape
            for path, shape in self.tree.linears.items()
            if not self._routes(path, modules[path])
        }

    def _routes(self, path: str, module: Any) -> bool:
        home = parent(path)
        has_experts = any(within(other, home) and other != home for other in self.tree.experts)
        has_list = any(within(other, f"{home}.experts") for other in self.tree.modules)
        return is_router(path, module) and (has_experts or has_list)


def find_spans(view: BlockView) -> list[Draft]:
    """Returns the block's spans in the order of the tree, attention before feed-forward."""
    linears = view.linears
    attentions = _attentions(view, linears)
    taken = [draft.root for draft in attentions if draft.root != view.path]
    used = {path for draft in attentions for path in draft.modules}
    rest = {
        path: shape
        for path, shape in linears.items()
        if path not in used and not any(within(path, root) for root in taken)
    }
    feed_forward = _feed_forward(view, rest, _width(linears, attentions))
    return attentions + ([feed_forward] if feed_forward else [])


def _width(linears: dict[str, tuple[int, int]], attentions: list[Draft]) -> int | None:
    return linears[attentions[0].modules[0]][0] if attentions else None


def _attentions(view: BlockView, linears: dict[str, tuple[int, int]]) -> list[Draft]:
    inputs: dict[str, list[tuple[str, tuple[Role, ...]]]] = {}
    for path in linears:
        roles = names.roles_of(leaf(path), names.ATTENTION)
        if roles:
            inputs.setdefault(parent(path), []).append((path, roles))
    cores = [
        core
        for core in inputs
        if not any(core != other and other and within(core, other) for other in inputs)
        and {role for _, roles in inputs[core] for role in roles} & {"query", "value"}
        and len(core) >= len(view.path)
    ]
    return [_attention(view, core, inputs[core], linears) for core in cores]


def _attention(
    view: BlockView,
    core: str,
    inputs: list[tuple[str, tuple[Role, ...]]],
    linears: dict[str, tuple[int, int]],
) -> Draft:
    crosses = names.CROSS.search(core[len(view.path) :])
    draft = Draft("cross-attention" if crosses else "attention", core, [])
    output = _output(view, core, {path for path, _ in inputs}, linears)
    head_inputs = linears[output][0] if output else None
    module = view.tree.modules[core]
    for path, roles in inputs:
        found = split_attention(path, roles, linears[path][1], head_inputs, module, view)
        draft.projections.extend(found)
    if output:
        draft.projections.append(Projection("output", output))
    have = {projection.role for projection in draft.projections}
    draft.missing += [
        f"{core}: no {role} projection found" for role in (*names.QKV, "output") if role not in have
    ]
    return draft


def _output(
    view: BlockView, core: str, inputs: set[str], linears: dict[str, tuple[int, int]]
) -> str | None:
    """Returns the attention's output linear: in the core, else in a sibling such as BERT's."""
    for home in (core, parent(core)):
        if not within(home, view.path) or (home == view.path and core != view.path):
            continue
        candidates = [
            path
            for path in linears
            if within(path, home) and path not in inputs and names.OUTPUT.fullmatch(leaf(path))
        ]
        exact = [path for path in candidates if parent(path) == core]
        if exact or candidates:
            return (exact or candidates)[0]
    return None


def _feed_forward(
    view: BlockView, linears: dict[str, tuple[int, int]], width: int | None
) -> Draft | None:
    projections: list[Projection] = []
    for path, shape in linears.items():
        roles = _feed_forward_roles(path, shape, linears, width)
        projections += split_feed_forward(path, roles, shape, linears, view.model_type)
    experts = _experts(view)
    if not projections and not experts:
        return None
    everything = sorted(projections + experts, key=lambda p: view.tree.position[p.module])
    draft = Draft("ffn", common([p.module for p in everything]), everything, bool(experts))
    have = {projection.role for projection in everything}
    draft.missing += [
        f"{view.path}: no {role} projection of the feed-forward found"
        for role in ("up", "down")
        if role not in have
    ]
    return draft


def _feed_forward_roles(
    path: str, shape: tuple[int, int], linears: dict[str, tuple[int, int]], width: int | None
) -> tuple[Role, ...]:
    name, home = leaf(path), parent(path)
    if name in ("w1", "w_1", "v1"):
        return ("gate",) if f"{home}.w3" in linears else ("up",)
    roles = names.roles_of(name, names.FEED_FORWARD)
    if roles == ("gate", "up") and not _is_doubled(shape, home, linears):
        return ("up",)
    if roles or name != "dense":
        return roles
    kind = leaf(home)
    if kind == "intermediate" or (width == shape[0] and shape[1] > shape[0]):
        return ("up",)
    return ("down",) if kind == "output" or width == shape[1] else ()


def _is_doubled(shape: tuple[int, int], home: str, linears: dict[str, tuple[int, int]]) -> bool:
    inner = [other[0] for path, other in linears.items() if parent(path) == home]
    return any(shape[1] == 2 * size for size in inner if size != shape[0]) or (
        2 * shape[0] == shape[1] and shape[0] in inner
    )


def _experts(view: BlockView) -> list[Projection]:
    """Returns the projections kept as 3-D parameters, one slice per expert."""
    found: list[Projection] = []
    for module, shapes in view.tree.experts.items():
        for name, shape in shapes.items():
            roles = names.roles_of(name.removesuffix("_weight"), names.FEED_FORWARD)
            found += split_feed_forward(module, roles, shape, {}, view.model_type, name)
    return found
