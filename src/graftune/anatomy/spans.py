"""Finds the spans of one block: attentions, the feed-forward, and what else takes a turn."""

from __future__ import annotations

from graftune.anatomy.attention import find_attentions
from graftune.anatomy.drafts import BlockView, Draft
from graftune.anatomy.feedforward import find_feed_forward
from graftune.anatomy.modules import leaf, parent, within


def find_spans(view: BlockView) -> list[Draft]:
    """Returns the block's spans in the order of the tree, attention before feed-forward.

    A block without attention that mixes tokens by other means (a state-space layer) has a draft
    without projections in that place, so that its norms aren't given to the feed-forward.
    """
    attentions = find_attentions(view)
    feed_forward = find_feed_forward(view, attentions)
    drafts = attentions + ([feed_forward] if feed_forward else [])
    mixer = None if attentions else _mixer(view, drafts)
    return [mixer, *drafts] if mixer else drafts


def _mixer(view: BlockView, drafts: list[Draft]) -> Draft | None:
    for path, module in view.tree.modules.items():
        child = path != view.path and parent(path) == view.path
        is_norm = path in view.tree.norms or "norm" in leaf(path)
        taken = any(within(other, path) for draft in drafts for other in draft.modules)
        if child and not is_norm and not taken and next(module.parameters(), None) is not None:
            return Draft("attention", path, [], missing=_unread(path, type(module).__name__, view))
    return None


def _unread(path: str, kind: str, view: BlockView) -> list[str]:
    """Returns a line if the module calls itself attention, of a kind that has queries and keys."""
    words = f"{kind} {leaf(path)}".lower()
    if "linear_attn" in words or not ("attention" in words or "attn" in words):
        return []
    found = [leaf(other) for other in view.linears if within(other, path)]
    return [f"{path} ({kind}): no query, key and value among {', '.join(found) or 'no linears'}"]
