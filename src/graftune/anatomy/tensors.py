"""Names of a model's own tensors, for methods that train tensors instead of linears."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from graftune.anatomy.layers import pick_layers
from graftune.anatomy.modules import GRAFTS, common, is_embedding, is_in, leaf, parent, within
from graftune.anatomy.packed import is_packed
from graftune.anatomy.parts import Anatomy, Projection, Role, Span, SpanKind
from graftune.anatomy.targets import ROLES, Layers
from graftune.errors import AnatomyError, nearest

if TYPE_CHECKING:
    from torch import Tensor, nn

SUBSETS = ("all", "no-norm", "query+intermediate")


def resolve_norms(model: nn.Module, anatomy: Anatomy, layers: Layers = None) -> tuple[str, ...]:
    """Returns the names of the norms' tensors (weights and biases), heads' norms left out.

    Raises:
        AnatomyError: If there are none, or a layer is out of range.
    """
    paths = _kept(anatomy, anatomy.norms, layers)
    names = tuple(
        f"{path}.{name}"
        for path in paths
        for name in model.get_submodule(path)._parameters
        if model.get_submodule(path)._parameters[name] is not None
    )
    if not names:
        raise AnatomyError(f"This {anatomy.model_type} has no norm with tensors{_where(layers)}.")
    return names


def resolve_biases(
    anatomy: Anatomy, subset: str = "all", layers: Layers = None, missing: Sequence[str] = ()
) -> tuple[str, ...]:
    """Returns the names of the body's biases, those of heads left out.

    Args:
        anatomy: The model's anatomy.
        subset: "all", "no-norm", "query+intermediate" (the biases of the query projections and of
            the feed-forward's first linears), or a regular expression that names match whole.
        layers: As in `resolve`.
        missing: Names of biases that linears lack and could be given; they are chosen from too.

    Raises:
        AnatomyError: If there are none; says whether the model has any at all.
    """
    every = [*anatomy.biases, *missing]
    chosen = {
        "all": lambda: every,
        "no-norm": lambda: [n for n in every if parent(n) not in set(anatomy.norms)],
        "query+intermediate": lambda: _query_and_intermediate(anatomy, every),
    }
    names = chosen[subset]() if subset in chosen else _matching(every, subset)
    kept = _kept(anatomy, names, layers)
    if not kept:
        raise AnatomyError(_no_biases(anatomy, subset, layers, len(_kept(anatomy, every, None))))
    return kept


def _query_and_intermediate(anatomy: Anatomy, every: list[str]) -> list[str]:
    held: dict[str, set[str]] = {}
    for block in anatomy.blocks:
        for span in block.spans:
            for part in span.projections:
                held.setdefault(f"{part.module}.bias", set()).add(part.role)
    wanted = {name for name, roles in held.items() if roles & {"query", "gate", "up"}}
    found = [name for name in every if name in wanted]
    for name in found:
        other = held[name] - {"query", "gate", "up"}
        if other:
            end = f"{leaf(parent(name))}.bias"
            raise AnatomyError(
                f'Biases "query+intermediate" can\'t be: {name} is one vector for query and '
                f"{' and '.join(sorted(other))}; to train it whole, give a pattern that names it, "
                f"r'.*{re.escape(end)}'."
            )
    return found


def _matching(every: list[str], subset: str) -> list[str]:
    try:
        pattern = re.compile(subset)
    except re.error as error:
        raise AnatomyError(f"Biases {subset!r} isn't a regular expression: {error}.") from error
    return [name for name in every if pattern.fullmatch(name)]


def _kept(anatomy: Anatomy, names: Sequence[str], layers: Layers) -> tuple[str, ...]:
    kept = [name for name in names if not is_in(name, anatomy.heads)]
    if layers is not None:
        blocks = [block.path for block in pick_layers(anatomy, layers)]
        kept = [name for name in kept if is_in(name, blocks)]
    return tuple(kept)


def _where(layers: Layers) -> str:
    return "" if layers is None else f" in layers {layers!r}"


def _no_biases(anatomy: Anatomy, subset: str, layers: Layers, have: int) -> str:
    kind = anatomy.model_type
    if not have:
        return f"This {kind} has no biases outside its head, so there are none to train."
    hint = nearest(subset, SUBSETS) if subset not in SUBSETS else ""
    return f"Biases {subset!r} match none of this {kind}'s {have} biases{_where(layers)}.{hint}"


WHOLE = ("norms", "biases", "embeddings", "head", "all")
"""Words for tensors, whatever holds them."""
WORDS = (*ROLES, *WHOLE)
_SPANS = ("attention", "self-attention", "cross-attention", "ffn")
_IN_EMBEDDINGS = re.compile(r".*embed.*|.*_tokens?")
"""Names of tensors that a module of embeddings holds itself: ViT's `cls_token`."""


def resolve_tensors(
    model: nn.Module,
    anatomy: Anatomy,
    targets: str | Sequence[str],
    layers: Layers = None,
    exclude: str | Sequence[str] = (),
) -> tuple[str, ...]:
    """Returns the names of the model's own tensors that `targets` mean, each tensor once.

    The names are those of `model.named_parameters()`, in its order, so that a tensor with several
    names (tied embeddings) goes by its first. Words, alone or in a list:

    - "query", "key", "value", "output", "qv", "up", "gate", "down": weights and biases of those
      projections, experts' 3-D tensors included. A fused tensor is one tensor: it is meant if all
      that it holds is asked for ("attention" of GPT-2), and refused if only some is ("query").
    - "attention", "self-attention", "cross-attention", "ffn": all such of the sublayer, and what
      else it holds (tables of relative positions, routers), without norms.
    - "blocks": every tensor inside a block, whatever it is.
    - "norms": weights and biases of all norms but heads'; "biases": those of linears, convolutions
      and norms but heads'.
    - "embeddings": tables of tokens, positions and types outside the blocks, patch convolutions,
      class tokens; no norms. Tied, the language-model head follows.
    - "head": task heads and the language-model head, what is tied to the body left out.
    - "all": every tensor but those of task heads (`anatomy.heads`); an LM head is among them.
    - the name of a module or tensor, or the end of one after a dot: all tensors in there, in
      heads too.
    - a single text that is none of these: a regular expression that whole names must match.

    Args:
        model: The model `anatomy` was read from, with or without adapters.
        anatomy: Its anatomy.
        targets: What is meant.
        layers: As in `resolve`: blocks to stay in; tensors outside blocks are then left out.
        exclude: What to leave out again, written like `targets`; one of the words above may mean
            nothing here, such as "biases" where there are none.

    Raises:
        AnatomyError: If a word or name matches nothing, or only tensors that are tied to others;
            if some tensor can't be trained (it is quantised) or is meant in part (it is fused); if
            nothing is left.
    """
    own = _Own(model, anatomy)
    chosen = own.meant(targets)
    for name, roles in (own.meant(exclude, is_needed=False) if exclude else {}).items():
        chosen[name] = chosen.get(name, set()) - roles
    chosen = {name: roles for name, roles in chosen.items() if roles}
    if layers is not None:
        blocks = [block.path for block in pick_layers(anatomy, layers)]
        chosen = {n: r for n, r in chosen.items() if is_in(n, blocks)}
    if not chosen:
        without = f" without {exclude!r}" if exclude else ""
        raise AnatomyError(f"Targets {targets!r}{without} leave no tensor{_where(layers)}.")
    own.check_whole(chosen)
    own.check_trainable(chosen)
    return tuple(name for name in own.tensors if name in {own.first(n) for n in chosen})


class _Own:
    """The model's own tensors by every name they have, and what words mean among them."""

    def __init__(self, model: nn.Module, anatomy: Anatomy) -> None:
        self.model, self.anatomy = model, anatomy
        every = model.named_parameters(remove_duplicate=False)
        self.tensors = {name: tensor for name, tensor in every if GRAFTS not in name.split(".")}
        self.firsts = {name: group[0] for group in anatomy.tied for name in group}
        self.spans: dict[str, list[tuple[SpanKind, Role]]] = {}
        for block in anatomy.blocks:
            for span in block.spans:
                for part in span.projections:
                    for name in self._tensors_of(part):
                        self.spans.setdefault(name, []).append((span.kind, part.role))
        for block in anatomy.blocks:
            for span in block.spans:
                for name in self._beside_projections(span):
                    self.spans[name] = [(span.kind, "other")]

    def _tensors_of(self, part: Projection) -> list[str]:
        bias = f"{part.module}.bias" if part.parameter == "weight" else f"{part.path}_bias"
        return [part.path, bias] if bias in self.tensors else [part.path]

    def _beside_projections(self, span: Span) -> list[str]:
        """Returns what a span's module holds beside projections and norms, if it holds no other."""
        own = {part.module for part in span.projections}
        home = span.module or common(sorted(own))
        inside = [name for name in self.tensors if within(name, home)]
        if not home or any(n in self.spans and parent(n) not in own for n in inside):
            return []
        norms = set(self.anatomy.norms)
        return [n for n in inside if n not in self.spans and parent(n) not in norms]

    def first(self, name: str) -> str:
        """Returns the name that a tensor goes by."""
        return self.firsts.get(name, name)

    def meant(self, targets: str | Sequence[str], *, is_needed: bool = True) -> dict[str, set[str]]:
        """Returns the roles asked for of each tensor asked for."""
        words = [targets] if isinstance(targets, str) else list(targets)
        if not words or not all(isinstance(word, str) and word for word in words):
            raise AnatomyError(f"targets must be a word or a list of words, got {targets!r}.")
        chosen: dict[str, set[str]] = {}
        for word in words:
            found = self._by_role(word)
            if not found and (is_needed or word not in WORDS):
                found = self._by_name(word, is_alone=isinstance(targets, str))
            for name, roles in found.items():
                chosen.setdefault(name, set()).update(roles)
        return chosen

    def _by_role(self, word: str) -> dict[str, set[str]]:
        if word in WHOLE or word == "blocks":
            return {name: self._roles(name) for name in self._whole(word)}
        kinds, wanted = ROLES.get(word, ((), ()))
        is_span = word in _SPANS
        found = {
            name: {role for kind, role in parts if kind in kinds and (is_span or role in wanted)}
            for name, parts in self.spans.items()
        }
        return {name: set[str](roles) for name, roles in found.items() if roles}

    def _roles(self, name: str) -> set[str]:
        return {role for _, role in self.spans.get(name, ((None, "other"),))}

    def _whole(self, word: str) -> list[str]:
        if word == "norms":
            norms = set(_kept(self.anatomy, self.anatomy.norms, None))
            return [name for name in self.tensors if parent(name) in norms]
        if word == "biases":
            return list(_kept(self.anatomy, self.anatomy.biases, None))
        if word == "embeddings":
            return [name for name in self.tensors if self._is_embedding(name)]
        if word == "head":
            heads = _heads(self.anatomy)
            return self._untied(word, [n for n in self.tensors if is_in(n, heads)])
        if word == "blocks":
            blocks = [block.path for block in self.anatomy.blocks]
            return self._untied(word, [n for n in self.tensors if is_in(n, blocks)])
        names = [name for name in self.tensors if self.first(name) == name]
        return list(_kept(self.anatomy, names, None))

    def _is_embedding(self, name: str) -> bool:
        home, blocks = parent(name), [block.path for block in self.anatomy.blocks]
        if is_in(name, [*blocks, *self.anatomy.heads]) or home in self.anatomy.norms:
            return False
        is_table = is_embedding(self.model.get_submodule(home))
        is_patch = home in self.anatomy.input_embeddings
        return is_table or is_patch or _IN_EMBEDDINGS.fullmatch(leaf(name)) is not None

    def _by_name(self, word: str, *, is_alone: bool) -> dict[str, set[str]]:
        found = [name for name in self.tensors if f".{word}." in f".{name}."]
        if not found and is_alone:
            found = self._matching(word)
        if not found:
            raise AnatomyError(self._unknown(word))
        return {name: self._roles(name) for name in self._untied(word, found)}

    def _matching(self, word: str) -> list[str]:
        try:
            pattern = re.compile(word)
        except re.error as error:
            raise AnatomyError(f"Target {word!r} isn't a regular expression: {error}.") from error
        return [name for name in self.tensors if pattern.fullmatch(name)]

    def _untied(self, word: str, names: list[str]) -> list[str]:
        """Returns the names without those of tensors that go by another, not asked for."""
        kept = [name for name in names if self.first(name) in names]
        if names and not kept:
            name = names[0]
            raise AnatomyError(
                f"Target {word!r} means only {', '.join(names)}, and {name} is tied to "
                f"{self.first(name)}: they are one tensor, so name {self.first(name)}, and "
                "training it trains both."
            )
        return kept

    def check_whole(self, chosen: dict[str, set[str]]) -> None:
        """Raises AnatomyError if a fused tensor is meant in part."""
        for name, roles in chosen.items():
            other = self._roles(name) - roles
            if other:
                raise AnatomyError(
                    f"{name} holds {' and '.join(sorted(roles))} together with "
                    f"{' and '.join(sorted(other))}, and a tensor is trained whole: ask for all of "
                    f'them, or name it ("{leaf(parent(name))}").'
                )

    def check_trainable(self, chosen: dict[str, set[str]]) -> None:
        """Raises AnatomyError if a tensor isn't made of numbers that can be trained."""
        wrong = [name for name in chosen if not _is_trainable(self.tensors.get(name))]
        if wrong:
            found = self.tensors.get(wrong[0])
            kind = "packed" if found is None else str(found.dtype).removeprefix("torch.")
            raise AnatomyError(
                f"{len(wrong)} of the {len(chosen)} tensors asked for are quantised and can't be "
                f"trained, such as {wrong[0]} ({kind}): load the base in 16 or 32 bit, or leave "
                "them out with exclude."
            )

    def _unknown(self, word: str) -> str:
        kind = self.anatomy.model_type
        roles = Counter(role for parts in self.spans.values() for _, role in set(parts))
        roles.pop("other", None)
        have = ", ".join(f"{role} ({count})" for role, count in roles.items()) or "none"
        if word in WORDS:
            return f"Target {word!r}: this {kind} has none. Its roles: {have}."
        ends = {".".join(n.split(".")[-size:]) for n in self.tensors for size in (1, 2, 3)}
        homes = Counter(leaf(parent(name)) for name in self.tensors if parent(name))
        modules = ", ".join(f"{name} ({count})" for name, count in homes.items())
        choices = [*WORDS, *homes, *sorted(ends)]
        return (
            f"Target {word!r} is neither a role nor the name of a module or tensor of this {kind}."
            f"{nearest(word, choices)} Words: {', '.join(WORDS)}; its modules: {modules}."
        )


def _is_trainable(tensor: Tensor | None) -> bool:
    """Whether a tensor holds plain numbers; those of 8 bits mean something with a scale only."""
    return tensor is not None and not is_packed(tensor)


def _heads(anatomy: Anatomy) -> list[str]:
    """Returns task heads, and all of the language-model head around its last linear."""
    output = anatomy.output_embeddings
    if output is None:
        return list(anatomy.heads)
    body = [block.path for block in anatomy.blocks] + list(anatomy.input_embeddings)
    while parent(output) and not any(within(path, parent(output)) for path in body):
        output = parent(output)
    return [*anatomy.heads, output]
