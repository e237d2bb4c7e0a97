"""Turns what a user calls a place ("qv", "q_proj", "layer.*key") into projections."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from graftune.anatomy.layers import pick_layers
from graftune.anatomy.modules import Tree, is_convolution, is_embedding, is_in, is_router
from graftune.anatomy.parts import Anatomy, Projection, Role, SpanKind
from graftune.errors import AnatomyError, nearest

if TYPE_CHECKING:
    from torch import nn

Layers = int | str | Sequence[int] | None
Key = tuple[str, str]
"""A tensor: its module's path and its name there."""

_ATTENTIONS: tuple[SpanKind, ...] = ("attention", "cross-attention")
_QKVO: tuple[Role, ...] = ("query", "key", "value", "output")
_FEED: tuple[Role, ...] = ("gate", "up", "down")

ROLES: dict[str, tuple[tuple[SpanKind, ...], tuple[Role, ...]]] = {
    "attention": (_ATTENTIONS, _QKVO),
    "self-attention": (("attention",), _QKVO),
    "cross-attention": (("cross-attention",), _QKVO),
    "query": (_ATTENTIONS, ("query",)),
    "key": (_ATTENTIONS, ("key",)),
    "value": (_ATTENTIONS, ("value",)),
    "output": (_ATTENTIONS, ("output",)),
    "qv": (_ATTENTIONS, ("query", "value")),
    "ffn": (("ffn",), _FEED),
    "up": (("ffn",), ("up",)),
    "gate": (("ffn",), ("gate",)),
    "down": (("ffn",), ("down",)),
    "blocks": ((*_ATTENTIONS, "ffn"), (*_QKVO, *_FEED)),
}
"""Role words by the kinds of span and the roles in them that they mean."""

WORDS = (*ROLES, "embeddings", "all-linear")
NOT_HERE = {
    "norms": "norms are tensors to train, not linears: use LayerNormTuning, or train_norms=True",
    "biases": "biases are tensors to train, not linears: use BitFit",
    "head": "heads train with every adapter already: see train_head",
}


class _Chosen:
    """Which roles of which tensors are asked for, in any order."""

    def __init__(self, anatomy: Anatomy, tree: Tree) -> None:
        self.tree = tree
        self.anatomy = anatomy
        self.parts: dict[Key, list[Projection]] = {}
        for block in anatomy.blocks:
            for span in block.spans:
                for part in span.projections:
                    self.parts.setdefault((part.module, part.parameter), []).append(part)
        self.wanted: dict[Key, set[Role]] = {}

    def add(self, key: Key, roles: Iterable[Role]) -> None:
        self.wanted.setdefault(key, set()).update(roles)

    def add_whole(self, key: Key) -> None:
        self.add(key, [part.role for part in self.parts.get(key, [])] or ["other"])

    def remove(self, other: _Chosen) -> None:
        for key, roles in other.wanted.items():
            left = self.wanted.pop(key, set()) - roles
            if left:
                self.wanted[key] = left

    def projections(self) -> tuple[Projection, ...]:
        order = sorted(self.wanted, key=lambda key: self.tree.position[key[0]])
        return tuple(p for key in order for p in self._slices(key, self.wanted[key]))

    def _slices(self, key: Key, roles: set[Role]) -> list[Projection]:
        """Returns one projection for the whole tensor if all its roles are wanted, else slices."""
        parts = self.parts.get(key, [])
        if not parts:
            return [Projection("other", *key)]
        wanted = [part for part in parts if part.role in roles]
        if len(wanted) == len(parts):
            return [Projection(_first(parts), *key)]
        return wanted


def _first(parts: list[Projection]) -> Role:
    """Returns the role a whole module goes by: "query" or "up" where it holds that."""
    roles: list[Role] = [part.role for part in parts]
    if "query" in roles:
        return "query"
    return "up" if "up" in roles else roles[0]


def resolve(
    model: nn.Module,
    anatomy: Anatomy,
    targets: str | Sequence[str],
    layers: Layers = None,
    exclude: str | Sequence[str] = (),
) -> tuple[Projection, ...]:
    """Returns the linear maps that `targets` mean, in the order of the module tree.

    A fused module of which every role is asked for is one whole projection; of which some are, one
    slice each. A module named that has no role is a whole projection of role "other". Heads are
    never among them.

    Args:
        model: The model `anatomy` was read from.
        anatomy: Its anatomy.
        targets: A role word (`ROLES`, "embeddings", "all-linear"), a module's name or the end of
            one ("q_proj", "attn.q_proj"), a list of such, or one regular expression that must
            match whole module names.
        layers: Blocks to stay in: an index over all stacks (negative from the end), a list of them,
            or a slice as text, "2:6". A module outside every block is then left out.
        exclude: What to leave out again, written like `targets`.

    Raises:
        AnatomyError: If a target, a layer or an exclusion names nothing that could be adapted.
    """
    tree = Tree(model)
    chosen = _choose(anatomy, tree, targets)
    if exclude:
        chosen.remove(_choose(anatomy, tree, exclude))
    if layers is not None:
        blocks = [block.path for block in pick_layers(anatomy, layers)]
        for key in [k for k in chosen.wanted if not is_in(k[0], blocks)]:
            del chosen.wanted[key]
    found = chosen.projections()
    if not found:
        kept = f" in layers {layers!r}" if layers is not None else ""
        raise AnatomyError(f"Targets {targets!r} without {exclude!r} leave nothing to adapt{kept}.")
    return found


def _choose(anatomy: Anatomy, tree: Tree, targets: str | Sequence[str]) -> _Chosen:
    words = [targets] if isinstance(targets, str) else list(targets)
    if not words or not all(isinstance(word, str) and word for word in words):
        raise AnatomyError(f"targets must be a word or a list of words, got {targets!r}.")
    chosen = _Chosen(anatomy, tree)
    for word in words:
        if _add_role(chosen, word) or _add_named(chosen, word):
            continue
        if not (isinstance(targets, str) and _add_matching(chosen, word)):
            raise AnatomyError(_unknown(word, chosen))
    return chosen


def _add_role(chosen: _Chosen, word: str) -> bool:
    if word == "all-linear":
        keys = [(path, "weight") for path in chosen.tree.linears if _is_free(path, chosen)]
        keys += [key for key in chosen.parts if key[0] in chosen.tree.experts]
    elif word == "embeddings":
        keys = [(path, "weight") for path in chosen.anatomy.input_embeddings]
    else:
        return _add_span_roles(chosen, word)
    for key in keys:
        chosen.add_whole(key)
    return bool(keys)


def _add_span_roles(chosen: _Chosen, word: str) -> bool:
    kinds, roles = ROLES.get(word, ((), ()))
    found = False
    for block in chosen.anatomy.blocks:
        for span in block.spans:
            if span.kind in kinds:
                for part in span.roles(*roles):
                    chosen.add((part.module, part.parameter), [part.role])
                    found = True
    return found


def _is_free(path: str, chosen: _Chosen) -> bool:
    """Whether a linear is neither the language-model head, nor in a head, nor a router."""
    anatomy = chosen.anatomy
    if path == anatomy.output_embeddings or _in_head(path, anatomy):
        return False
    return path not in _routers(chosen)


def _routers(chosen: _Chosen) -> set[str]:
    homes = {s.module for b in chosen.anatomy.blocks for s in b.spans if s.experts and s.module}
    if not homes:
        return set()
    return {
        path
        for path in chosen.tree.linears
        if is_router(path, chosen.tree.modules[path]) and is_in(path, homes)
    }


def _in_head(path: str, anatomy: Anatomy) -> bool:
    return is_in(path, anatomy.heads)


def _targetable(chosen: _Chosen) -> dict[str, Key]:
    """Returns what can be named: linears, convolutions, embeddings, expert tensors."""
    names: dict[str, Key] = {}
    for path, module in chosen.tree.modules.items():
        if path in chosen.tree.linears or is_embedding(module) or is_convolution(module):
            names[path] = (path, "weight")
        for parameter in chosen.tree.experts.get(path, {}):
            names[f"{path}.{parameter}"] = (path, parameter)
    return names


def _add_named(chosen: _Chosen, word: str) -> bool:
    """Adds modules by HF PEFT's rule: the whole name, or its end after a dot."""
    names = _targetable(chosen)
    return _add_all(
        chosen, word, {n: k for n, k in names.items() if n == word or n.endswith("." + word)}
    )


def _add_matching(chosen: _Chosen, word: str) -> bool:
    try:
        pattern = re.compile(word)
    except re.error as error:
        raise AnatomyError(f"Target {word!r} isn't a regular expression: {error}.") from error
    names = _targetable(chosen)
    return _add_all(chosen, word, {n: k for n, k in names.items() if pattern.fullmatch(n)})


def _add_all(chosen: _Chosen, word: str, found: dict[str, Key]) -> bool:
    body = {n: key for n, key in found.items() if not _in_head(key[0], chosen.anatomy)}
    if found and not body:
        names = ", ".join(found)
        raise AnatomyError(
            f"Target {word!r} means only {names}, which is the task head; heads are trained whole "
            "with the adapter, so name linears of the body instead."
        )
    for key in body.values():
        chosen.add_whole(key)
    return bool(body)


def _unknown(word: str, chosen: _Chosen) -> str:
    if word in NOT_HERE:
        return f"Target {word!r} can't be a target: {NOT_HERE[word]}."
    roles = Counter(part.role for parts in chosen.parts.values() for part in parts)
    leaves = Counter(name.rpartition(".")[2] for name in _targetable(chosen))
    have = ", ".join(f"{role} ({count})" for role, count in roles.items()) or "none"
    linears = ", ".join(f"{name} ({count})" for name, count in leaves.items()) or "none"
    kind = chosen.anatomy.model_type
    if word in WORDS:
        return f"Target {word!r}: this {kind} has none. Its roles: {have}; its modules: {linears}."
    if word in chosen.tree.modules or any(n.endswith("." + word) for n in chosen.tree.modules):
        start = (
            f"Target {word!r} is a module of this {kind}, but no linear, embedding or convolution."
        )
        return f"{start} Its linears: {linears}."
    hint = nearest(word, [*WORDS, *leaves])
    return (
        f"Target {word!r} is neither a role nor a module of this {kind}.{hint} "
        f"Its roles: {have}; its modules: {linears}."
    )
