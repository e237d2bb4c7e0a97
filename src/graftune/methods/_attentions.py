"""The attentions that a method acts in: where they are, and what makes their keys and values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from graftune.anatomy import Anatomy, Block, Projection, Span, table
from graftune.anatomy.fused import head_size
from graftune.anatomy.layers import pick_layers
from graftune.anatomy.modules import parent
from graftune.errors import SettingsError
from graftune.sites import hosts
from graftune.sites.attention import asks_the_registry, base_name, check_implementation
from graftune.sites.base import AttentionPlace


@dataclass(frozen=True)
class Attention:
    """One attention that a method acts in."""

    place: AttentionPlace
    group: str
    """Stack and kind: those that share an MLP."""
    key: int
    """Width of its keys, over all heads."""
    value: int
    width: int
    """Features of what it is given."""
    heads: int
    """Of queries."""
    size: int
    """Features of one head."""
    maps: tuple[Projection, Projection]
    """What makes its keys and its values."""
    norms: tuple[str, ...]
    """Those inside it."""
    options: dict[str, Any]


def attentions(
    method: str,
    model: nn.Module,
    anatomy: Anatomy,
    kinds: Sequence[str],
    layers: int | str | tuple[int, ...] | None,
) -> Iterator[Attention]:
    """Yields the attentions of some kinds in the blocks that `layers` means, block by block.

    Raises:
        SettingsError: there is none, or one can't take a prefix.
    """
    blocks = anatomy.blocks if layers is None else pick_layers(anatomy, layers)
    yield from attentions_of(method, model, anatomy, kinds, blocks)


def attentions_of(
    method: str, model: nn.Module, anatomy: Anatomy, kinds: Sequence[str], blocks: Sequence[Block]
) -> Iterator[Attention]:
    """Yields the attentions of some kinds in some blocks.

    Raises:
        SettingsError: there is none, or one can't take a prefix.
    """
    stacks = {block.path: stack.kind for stack in anatomy.stacks for block in stack.blocks}
    found = False
    for block in blocks:
        for span in block.spans:
            if span.kind in kinds:
                found = True
                group = f"prefix_{stacks[block.path]}_{span.kind.replace('-', '_')}"
                yield _attention(method, model, span, group, anatomy.model_type)
    if not found:
        raise SettingsError(
            f"{method}: no block of this {type(model).__name__} has {' or '.join(kinds)}."
        )


def _attention(method: str, model: nn.Module, span: Span, group: str, model_type: str) -> Attention:
    query, key, value = (_one(method, span, role) for role in ("query", "key", "value"))
    path = parent(query.module)
    host: Any = model.get_submodule(path)
    if model_type not in table.OWN_SOFTMAX:
        _check_asks(method, path, host)
    width, keys, values = (_width(model, part) for part in (query, key, value))
    size = head_size(host)
    return Attention(
        AttentionPlace(path, span.kind, biases=_biases(model, path)),
        group,
        keys,
        values,
        hosts.features(model.get_submodule(query.module))[0],
        width // size if size else 1,
        size or width,
        (key, value),
        span.inner_norms,
        hosts.delta_options(model.get_submodule(query.module)),
    )


def _biases(model: nn.Module, path: str) -> str | None:
    """Returns the first attention of T5's stack, which has the relative biases of all."""
    stack, _, rest = path.partition(".block.")
    block, _, inner = rest.partition(".")
    if not block.isdigit():
        return None
    first = f"{stack}.block.0.{inner}"
    host: Any = model.get_submodule(first)
    return first if getattr(host, "has_relative_attention_bias", False) else None


def _check_asks(method: str, path: str, host: Any) -> None:
    if not asks_the_registry(host) or not hasattr(host, "config"):
        raise SettingsError(
            f"{method}: {path} ({type(host).__name__}) computes its attention itself, without "
            "transformers' attention functions, so no keys and values can be put before its own."
        )
    check_implementation(base_name(host.config))


def _one(method: str, span: Span, role: str) -> Projection:
    found = span.roles(role)
    if not found:
        raise SettingsError(f"{method}: {span.module} has no {role} projection of its own.")
    return found[0]


def _width(model: nn.Module, part: Projection) -> int:
    if part.rows is None:
        return hosts.features(model.get_submodule(part.module))[1]
    return sum(stop - start for start, stop in part.rows)
