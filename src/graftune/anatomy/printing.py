"""An anatomy as a table for people: one row per span, alike blocks folded into one."""

from __future__ import annotations

from itertools import groupby

from graftune.anatomy.parts import Anatomy, Block, Projection, Span, Stack


def render(anatomy: Anatomy) -> str:
    """Returns a compact table of stacks and spans, what lies around them and what is missing."""
    lines = [
        f"{anatomy.model_type}: {len(anatomy.blocks)} layers in {len(anatomy.stacks)} stack(s)"
    ]
    for stack in anatomy.stacks:
        lines += _stack(stack)
    lines += [
        f"embeddings: {', '.join(anatomy.input_embeddings) or 'none found'}",
        f"language-model head: {anatomy.output_embeddings or 'none'}",
        f"heads: {', '.join(_head(path, anatomy) for path in anatomy.heads) or 'none'}",
        f"norms: {len(anatomy.norms)}, biases: {len(anatomy.biases)}",
        *(f"tied: {' = '.join(group)}" for group in anatomy.tied),
    ]
    if anatomy.missing:
        lines += ["not found:", *(f"  {line}" for line in anatomy.missing)]
    return "\n".join(lines)


def _head(path: str, anatomy: Anatomy) -> str:
    return f"{path} (new)" if path in anatomy.new_heads else path


def _stack(stack: Stack) -> list[str]:
    lines = [f"{stack.kind} {stack.path}"]
    for _, same in groupby(stack.blocks, key=_shape):
        blocks = list(same)
        first, last = blocks[0], blocks[-1]
        numbers = (
            f"layers {first.index}-{last.index}" if len(blocks) > 1 else f"layer {first.index}"
        )
        lines.append(f"  {numbers}: width {first.width}, {first.order}-norm")
        lines += [f"    {_span(span, first)}" for span in first.spans]
        if not any(span.kind == "attention" for span in first.spans):
            lines.append("    no attention in block")
    return lines


def _shape(block: Block) -> tuple[object, ...]:
    return (block.order, block.width, *(_span(span, block) for span in block.spans))


def _span(span: Span, block: Block) -> str:
    def short(path: str) -> str:
        return path.removeprefix(block.path + ".")

    parts: dict[str, list[Projection]] = {}
    for projection in span.projections:
        parts.setdefault(short(projection.path.removesuffix(".weight")), []).append(projection)
    words = [f"{'+'.join(p.role for p in group)} {path}" for path, group in parts.items()]
    fused = {p.layout for p in span.projections if p.is_fused}
    notes = [f"fused {layout}" for layout in sorted(fused)]
    notes += ["experts"] if span.experts else []
    notes += ["adds its residual"] if span.adds_residual else []
    norms = f"; norms {', '.join(map(short, span.norms))}" if span.norms else ""
    note = f" ({', '.join(notes)})" if notes else ""
    return f"{span.kind}: {', '.join(words)}{norms}{note}"
