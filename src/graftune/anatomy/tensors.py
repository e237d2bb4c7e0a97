"""Names of the norms' and biases' tensors, for methods that train tensors instead of linears."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from graftune.anatomy.layers import pick_layers
from graftune.anatomy.modules import parent, within
from graftune.anatomy.parts import Anatomy
from graftune.errors import AnatomyError, nearest

if TYPE_CHECKING:
    from torch import nn

Layers = int | str | Sequence[int] | None
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


def resolve_biases(anatomy: Anatomy, subset: str = "all", layers: Layers = None) -> tuple[str, ...]:
    """Returns the names of the body's biases, those of heads left out.

    Args:
        anatomy: The model's anatomy.
        subset: "all", "no-norm", "query+intermediate" (the biases of the query projections and of
            the feed-forward's first linears), or a regular expression that names match whole.
        layers: As in `resolve`.

    Raises:
        AnatomyError: If there are none; says whether the model has any at all.
    """
    chosen = {
        "all": lambda: list(anatomy.biases),
        "no-norm": lambda: [n for n in anatomy.biases if parent(n) not in set(anatomy.norms)],
        "query+intermediate": lambda: _query_and_intermediate(anatomy),
    }
    names = chosen[subset]() if subset in chosen else _matching(anatomy, subset)
    kept = _kept(anatomy, names, layers)
    if not kept:
        raise AnatomyError(_no_biases(anatomy, subset, layers))
    return kept


def _query_and_intermediate(anatomy: Anatomy) -> list[str]:
    wanted = {
        f"{projection.module}.bias"
        for block in anatomy.blocks
        for span in block.spans
        for projection in span.roles("query", "gate", "up")
    }
    return [name for name in anatomy.biases if name in wanted]


def _matching(anatomy: Anatomy, subset: str) -> list[str]:
    try:
        pattern = re.compile(subset)
    except re.error as error:
        raise AnatomyError(f"Biases {subset!r} isn't a regular expression: {error}.") from error
    return [name for name in anatomy.biases if pattern.fullmatch(name)]


def _kept(anatomy: Anatomy, names: Sequence[str], layers: Layers) -> tuple[str, ...]:
    kept = [name for name in names if not any(within(name, head) for head in anatomy.heads)]
    if layers is not None:
        blocks = pick_layers(anatomy, layers)
        kept = [name for name in kept if any(within(name, block.path) for block in blocks)]
    return tuple(kept)


def _where(layers: Layers) -> str:
    return "" if layers is None else f" in layers {layers!r}"


def _no_biases(anatomy: Anatomy, subset: str, layers: Layers) -> str:
    have = len(_kept(anatomy, anatomy.biases, None))
    kind = anatomy.model_type
    if not have:
        return f"This {kind} has no biases outside its head, so there are none to train."
    hint = nearest(subset, SUBSETS) if subset not in SUBSETS else ""
    return f"Biases {subset!r} match none of this {kind}'s {have} biases{_where(layers)}.{hint}"
