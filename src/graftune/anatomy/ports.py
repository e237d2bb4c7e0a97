"""Where a sublayer's tensors can be read while it runs, and where its answer can be changed.

    pre-norm    y = x + F(N(x))          residual x, input N(x), answer h = F(N(x))
    sandwich    y = x + N'(F(N(x)))      answer h = N'(F(N(x)))
    parallel    y = x + F(N(x)) + G(M(x))
    post-norm   y = N(x + F(x))          residual x = input, answer h = F(x), then the norm

The answer is taken as near to the residual sum as a module reaches: after dropout where that is a
module of its own, else before it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from graftune.anatomy import table
from graftune.anatomy.layers import pick_layers
from graftune.anatomy.modules import parent, within
from graftune.anatomy.parts import Anatomy, Block, Span, SpanKind
from graftune.errors import AnatomyError

Layers = int | str | Sequence[int] | None


@dataclass(frozen=True)
class Ports:
    """Modules of one sublayer by what passes through them."""

    answer: str
    """Module whose output (or the first of it) is h, what the residual sum takes."""
    input: str
    """Module whose first argument is what the sublayer sees."""
    residual: str | None
    """Module whose first argument is what h is added to; None if no module sees it as it is."""
    norm: str | None
    """Norm of the sum, in post-norm blocks."""


@dataclass(frozen=True)
class Sublayer:
    """An attention or feed-forward of one block."""

    block: Block
    kind: SpanKind
    ports: Ports

    @property
    def name(self) -> str:
        """Path of the block and the kind, as in `encoder.layer.0.ffn`."""
        return f"{self.block.path}.{self.kind}"


def resolve_sublayers(
    model: nn.Module, anatomy: Anatomy, kinds: Collection[SpanKind], layers: Layers = None
) -> list[Sublayer]:
    """Returns the sublayers of some kinds, block by block.

    Raises:
        AnatomyError: no block has one, or `layers` doesn't fit the model.
    """
    blocks = anatomy.blocks if layers is None else pick_layers(anatomy, layers)
    modules = dict(model.named_modules())
    found = [
        Sublayer(block, span.kind, find_ports(modules, anatomy, block, span))
        for block in blocks
        for span in block.spans
        if span.kind in kinds
    ]
    if not found:
        raise AnatomyError(
            f"None of the {len(blocks)} blocks of {type(model).__name__} has "
            f"{' or '.join(kinds)}; gt.anatomy(model) shows what was found."
        )
    return found


def find_ports(
    modules: Mapping[str, nn.Module], anatomy: Anatomy, block: Block, span: Span
) -> Ports:
    """Returns where a sublayer can be read and changed; `modules` are the model's by path."""
    is_post = block.order == "post" and bool(span.norms)
    seen = _input(span)
    return Ports(
        answer=_answer(modules, block, span),
        input=seen,
        residual=seen if is_post else _residual(modules, anatomy, block, span),
        norm=span.norms[0] if is_post else None,
    )


def _input(span: Span) -> str:
    """Returns the first projection's module; of experts, which see tokens sorted, their span's."""
    first = span.roles("query", "up", "gate") or span.projections
    return span.module if span.experts and span.module else first[0].module


def _answer(modules: Mapping[str, nn.Module], block: Block, span: Span) -> str:
    last = (span.roles("output", "down") or span.projections)[-1].module
    if block.order == "sandwich" and span.norms:
        return span.norms[-1]
    if span.adds_residual:
        return last
    return _dropout(modules, block, span, last) or span.module or last


def _dropout(modules: Mapping[str, nn.Module], block: Block, span: Span, last: str) -> str | None:
    """Returns the dropout that ends a sublayer: beside its output alone, or beside it and a norm.

    BERT's `output` holds `dense`, `dropout` and the norm; T5's `layer.0` the attention, its norm
    and `dropout`. One that several sublayers share (ViT's), or of attention weights, isn't it.
    """
    home = parent(span.module or last)
    path = f"{home}.dropout"
    if home == block.path or not within(home, block.path):
        return None
    module = modules.get(path)
    inside = {p.role for s in block.spans for p in s.projections if within(p.module, home)}
    alone = inside <= {"output", "down"}
    whole = span.module is not None and any(parent(norm) == home for norm in span.norms)
    return path if isinstance(module, nn.Dropout) and (alone or whole) else None


def _residual(
    modules: Mapping[str, nn.Module], anatomy: Anatomy, block: Block, span: Span
) -> str | None:
    """Returns the pre-norm; where a block has an Identity in its place, that; or a shared norm.

    Where the norm's output is what answers are added to, what sees that.
    """
    if span.kind == "attention" and anatomy.model_type in table.WINDOWED:
        return None
    if getattr(modules.get(block.path), table.RESIDUAL_IS_NORMED, False):
        return _input(span)
    if span.norms:
        return span.norms[0]
    for other in _likes(anatomy, block, span):
        name = block.path + other
        if name in modules:
            return name
    shared = [norm for other in block.spans for norm in other.norms]
    return shared[0] if block.order == "parallel" and shared else None


def _likes(anatomy: Anatomy, block: Block, span: Span) -> Iterator[str]:
    """Yields where other blocks of the stack have this sublayer's first norm, below the block."""
    stack = next(stack for stack in anatomy.stacks if block in stack.blocks)
    for other in stack.blocks:
        for twin in other.spans:
            if twin.kind == span.kind and twin.norms:
                yield twin.norms[0].removeprefix(other.path)
