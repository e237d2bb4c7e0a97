"""Which norm belongs to which span, and where norms sit: before, after, around, or shared."""

from __future__ import annotations

from graftune.anatomy import table
from graftune.anatomy.drafts import BlockView, Draft
from graftune.anatomy.modules import leaf, parent, within
from graftune.anatomy.parts import Order


def find_order(view: BlockView, drafts: list[Draft], outer: list[str]) -> Order:
    """Returns the block's order: the table's, else what the norms' places and number say.

    A norm beside an output linear in a module of its own (BERT's `output.LayerNorm`) comes after
    the residual sum. Twice as many norms as spans surround them, and norms all called `post_`
    (OLMo 2) end the branch before the sum; fewer norms than spans are shared by parallel spans.
    """
    known = table.ORDERS.get(view.model_type)
    if known is not None:
        return known(view.config) if callable(known) else known
    if any(_is_beside_output(norm, drafts) for norm in outer):
        return "post"
    named_post = len(outer) == len(drafts) and all(leaf(n).startswith("post_") for n in outer)
    if len(drafts) > 1 and (named_post or len(outer) >= 2 * len(drafts)):
        return "sandwich"
    return "parallel" if len(drafts) > 1 and len(outer) < len(drafts) else "pre"


def _is_beside_output(norm: str, drafts: list[Draft]) -> bool:
    home = parent(norm)
    beside = [p.role for d in drafts for p in d.projections if parent(p.module) == home]
    return bool(beside) and set(beside) <= {"output", "down"}


def outer_norms(view: BlockView, drafts: list[Draft]) -> list[str]:
    """Returns the block's norms outside its spans, in tree order.

    A norm left out of one block only (ModernBERT's first) keeps its place as an Identity.
    """
    outer = [
        path
        for path in _places(view)
        if not any(_is_inner(path, draft, view, drafts) for draft in drafts)
        and _is_on_the_way(path, drafts, view)
    ]
    by_name = {leaf(path): path for path in outer}
    known = next((order for order in table.RUN_ORDER if set(order) == set(by_name)), None)
    return [by_name[name] for name in known] if known else outer


def _is_on_the_way(norm: str, drafts: list[Draft], view: BlockView) -> bool:
    """Whether a norm sits on the block or around a span, and not in a part beside them."""
    home = parent(norm)
    around = any(within(path, home) for draft in drafts for path in draft.modules)
    return home == view.path or around or _home(norm, drafts, view) is not None


def inner_norms(view: BlockView, draft: Draft, drafts: list[Draft]) -> tuple[str, ...]:
    """Returns the norms inside a span (of queries and keys, say), in tree order."""
    places = _places(view)
    norms = set(view.tree.norms)
    return tuple(p for p in places if p in norms and _is_inner(p, draft, view, drafts))


def _places(view: BlockView) -> list[str]:
    norms = set(view.tree.norms)
    return [
        path
        for path, module in view.tree.modules.items()
        if path in norms or ("norm" in leaf(path) and type(module).__name__ == "Identity")
    ]


def _is_inner(norm: str, draft: Draft, view: BlockView, drafts: list[Draft]) -> bool:
    root = draft.core if draft.kind != "ffn" else draft.root
    if root == view.path or not within(norm, root):
        return False
    closes_span = leaf(norm) in ("LayerNorm", "layer_norm")  # ALBERT adds and normalises inside
    return not closes_span and not _is_beside_output(norm, drafts)


def norms_of(draft: Draft, drafts: list[Draft], outer: list[str], view: BlockView) -> list[str]:
    """Returns the norms of one span: those that share a container with it, else by turn."""
    homes = {norm: _home(norm, drafts, view) for norm in outer}
    own = [norm for norm in outer if homes[norm] is draft]
    free = [norm for norm in outer if homes[norm] is None]
    waiting = [d for d in drafts if not any(home is d for home in homes.values())]
    if draft in waiting and free:
        own = _share(free, waiting.index(draft), len(waiting))
    return [norm for norm in own if norm in set(view.tree.norms)]


def _share(free: list[str], turn: int, turns: int) -> list[str]:
    if len(free) < turns:
        return free
    each = 2 if len(free) >= 2 * turns else 1
    if each == 1 and turn > 0:
        return free[turn - turns :][:1]
    return free[turn * each : (turn + 1) * each]


def _home(norm: str, drafts: list[Draft], view: BlockView) -> Draft | None:
    """Returns the only span that shares the norm's smallest container below the block."""
    home = parent(norm)
    while home != view.path and within(home, view.path):
        inside = [d for d in drafts if any(within(path, home) for path in d.modules)]
        if inside:
            return inside[0] if len(inside) == 1 else None
        home = parent(home)
    return None


def span_module(draft: Draft, drafts: list[Draft], outer: list[str], view: BlockView) -> str | None:
    """Returns the module that is the whole span, as large as it can be without its norms.

    None where there is none: OPT's `fc1` hangs on the block, BERT's output modules also add and
    normalise.
    """
    root, others = draft.root, [path for d in drafts if d is not draft for path in d.modules]

    def fits(path: str) -> bool:
        return path != view.path and not any(within(p, path) for p in (*others, *outer))

    if not within(root, view.path) or not fits(root):
        return None
    while fits(parent(root)) and within(parent(root), view.path):
        root = parent(root)
    return root
