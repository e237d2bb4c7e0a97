"""Reads a model's anatomy off its module tree; never runs, changes or copies the model."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from graftune.anatomy import order, surroundings, table
from graftune.anatomy.blocks import find_chains, stack_kind
from graftune.anatomy.drafts import BlockView, Draft
from graftune.anatomy.given import check_given
from graftune.anatomy.modules import Tree
from graftune.anatomy.parts import Anatomy, Block, Span, Stack
from graftune.anatomy.spans import find_spans
from graftune.errors import AnatomyError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


def anatomy(model: nn.Module, given: Anatomy | None = None) -> Anatomy:
    """Returns what `model` is made of: stacks, blocks, spans, projections, norms, heads.

    Works on the meta device, on quantised models and on models with adapters attached; the model,
    its mode, its hooks and every random state stay as they are. What could not be found is named,
    a line each, in `Anatomy.missing`.

    Args:
        model: Any transformers model.
        given: Your own description; its paths are checked and it is returned.

    Raises:
        AnatomyError: If `model` isn't a transformers model or `given` names what it doesn't have.
    """
    if not hasattr(model, "config") or not hasattr(model, "named_modules"):
        found = type(model).__name__
        raise AnatomyError(f"anatomy needs a transformers model (PreTrainedModel), not {found}.")
    tree = Tree(model)
    if given is not None:
        return check_given(given, tree)
    return _discover(cast("PreTrainedModel", model), tree)


def _discover(model: PreTrainedModel, tree: Tree) -> Anatomy:
    model_type = str(getattr(model.config, "model_type", "") or type(model).__name__)
    stacks, missing = _stacks(model, tree, model_type)
    paths = [block.path for stack in stacks for block in stack.blocks]
    output = surroundings.output_embeddings(model, tree)
    heads = surroundings.heads(model, tree, output)
    new = surroundings.new_heads(model, tree, heads, paths, model_type)
    return Anatomy(
        model_type=model_type,
        stacks=stacks,
        input_embeddings=surroundings.input_embeddings(model, tree, paths),
        output_embeddings=output,
        heads=heads + tuple(path for path in new if path not in heads),
        new_heads=new,
        norms=surroundings.norms(tree),
        biases=surroundings.biases(tree),
        tied=surroundings.tied_tensors(tree),
        read_by_parent=tuple(p for p in tree.position if _last(p) in table.READ_BY_PARENT),
        once_for_all_rows=tuple(p for p in tree.position if _is_shared(p, model_type)),
        missing=missing,
    )


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def _is_shared(path: str, model_type: str) -> bool:
    """Whether a module sees one input for all rows of a batch."""
    ends = table.ONCE_FOR_ALL_ROWS.get(model_type, ())
    sees_positions = table.OF_POSITIONS.fullmatch(_last(path)) is not None
    return sees_positions or f".{path}".endswith(tuple(f".{end}" for end in ends))


def _stacks(
    model: PreTrainedModel, tree: Tree, model_type: str
) -> tuple[tuple[Stack, ...], tuple[str, ...]]:
    stacks: list[Stack] = []
    missing: list[str] = []
    index = 0
    for chain in find_chains(tree):
        blocks: list[Block] = []
        for path in chain.blocks:
            view = BlockView(tree.below(path), path, model_type, model.config)
            block, lines = _block(view, index, len(blocks))
            blocks.append(block)
            missing += lines
            index += 1
        if blocks and not any(span.kind == "ffn" for block in blocks for span in block.spans):
            missing += _no_feed_forward(chain.path, blocks)
        kind = stack_kind(chain.path, tree, model_type, model.config)
        stacks.append(Stack(kind, chain.path, tuple(blocks)))
    if not stacks:
        missing.append("no list of blocks with attention or feed-forward linears found")
    return tuple(stacks), tuple(missing)


def _no_feed_forward(path: str, blocks: list[Block]) -> list[str]:
    """Returns a line if a stack's attentions have no feed-forward beside them, as XLM's haven't.

    Stacks of cross-attentions alone, and of state-space layers, are made so.
    """
    attends = any(span.kind == "attention" for block in blocks for span in block.spans)
    lone = attends and "cross" not in path
    return [f"{path}: no feed-forward in any of its {len(blocks)} blocks"] if lone else []


def _block(view: BlockView, index: int, position: int) -> tuple[Block, list[str]]:
    drafts = find_spans(view)
    outer = order.outer_norms(view, drafts)
    spans = tuple(_span(draft, drafts, outer, view) for draft in drafts if draft.projections)
    width = _width(view, spans)
    lines = [line for draft in drafts for line in draft.missing]
    kind = order.find_order(view, drafts, outer)
    return Block(view.path, index, position, kind, width, spans), lines


def _span(draft: Draft, drafts: list[Draft], outer: list[str], view: BlockView) -> Span:
    return Span(
        kind=draft.kind,
        module=order.span_module(draft, drafts, outer, view),
        projections=tuple(draft.projections),
        norms=tuple(order.norms_of(draft, drafts, outer, view)),
        inner_norms=order.inner_norms(view, draft, drafts),
        adds_residual=view.model_type in table.ADDS_RESIDUAL,
        experts=draft.experts,
    )


def _width(view: BlockView, spans: tuple[Span, ...]) -> int:
    """Returns the width of the block's hidden state: what its outputs write."""
    for span in spans:
        for projection in span.roles("output", "down"):
            if projection.module in view.tree.linears:
                return view.tree.linears[projection.module][1]
    return 0
