"""The order of a block as its own forward shows it, on the meta device, by following gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from graftune.anatomy import Anatomy, Block, Span


def trace(model: nn.Module, found: Anatomy) -> dict[str, tuple[str, dict[str, list[str]]]]:
    """Returns, per block that ran, its order and each span's norms in the order they ran.

    Raises whatever the model's forward raises: not every one runs on the meta device.
    """
    calls: list[tuple[str, Tensor, Tensor]] = []
    handles = [m.register_forward_hook(_Keep(p, calls), with_kwargs=True) for p, m in _named(model)]
    try:
        _run(model)
    finally:
        for handle in handles:
            handle.remove()
    seen = {path: (given, result) for path, given, result in reversed(calls)}
    places = {path: place for place, (path, _, _) in enumerate(calls)}
    return {
        block.path: _block(block, found, seen, places)
        for block in found.blocks
        if block.path in seen and block.spans
    }


def _named(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return list(model.named_modules())


class _Keep:
    def __init__(self, path: str, calls: list[tuple[str, Tensor, Tensor]]) -> None:
        self.path, self.calls = path, calls

    def __call__(self, _: Any, args: Any, kwargs: Any, output: Any) -> None:
        given = [*args, kwargs.get("hidden_states"), *kwargs.values()]
        first = next((v for v in given if isinstance(v, Tensor) and v.is_floating_point()), None)
        result = output[0] if isinstance(output, tuple) else output
        if first is not None and isinstance(result, Tensor):
            self.calls.append((self.path, first, result))


def _run(model: Any) -> None:
    ids = torch.ones(1, 8, dtype=torch.long, device="meta")
    given: dict[str, Any] = {"input_ids": ids}
    if getattr(model.config, "is_encoder_decoder", False):
        given["decoder_input_ids"] = ids
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        model(**given)


def _reaches(tensor: Tensor, goals: list[Tensor], walls: list[Tensor]) -> bool:
    """Whether `tensor` was computed from one of `goals` without passing through `walls`."""
    wanted = {id(goal.grad_fn) for goal in goals if goal.grad_fn is not None}
    seen = {id(wall.grad_fn) for wall in walls if wall.grad_fn is not None}
    todo: list[Any] = [tensor.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or (id(node) in seen and id(node) not in wanted):
            continue
        if id(node) in wanted:
            return True
        seen.add(id(node))
        todo += [following for following, _ in node.next_functions]
    return False


def _block(
    block: Block, found: Anatomy, seen: dict[str, Any], places: dict[str, int]
) -> tuple[str, dict[str, list[str]]]:
    entering = seen[block.path][0]
    inner = {norm for span in block.spans for norm in span.inner_norms}
    outer = [n for n in found.norms if n.startswith(f"{block.path}.") and n in seen]
    outer = sorted((n for n in outer if n not in inner), key=lambda n: places[n])
    orders: list[str] = []
    norms: dict[str, list[str]] = {}
    earlier: list[Tensor] = []
    for span in block.spans:
        ends = _ends(span, seen)
        if ends is None:
            continue
        start, end = ends
        taken = {norm for group in norms.values() for norm in group}
        outer = [n for n in outer if n not in taken or len(outer) == 1]
        before = [n for n in outer if _feeds(n, start, seen, [*earlier, entering])]
        alone = [
            n
            for n in outer
            if _reaches(seen[n][0], [end], []) and not _reaches(seen[n][0], [entering], [end])
        ]
        after = [n for n in outer if n not in alone and _reads_sum(n, end, seen, outer)]
        norms[span.kind] = (before + alone) or after[:1]
        if earlier and not _reaches(start, earlier, []):
            orders.append("parallel")
        elif alone:
            orders.append("sandwich")
        else:
            orders.append("pre" if before or not after else "post")
        earlier.append(end)
    names = set(orders)
    order = "parallel" if "parallel" in names else "/".join(sorted(names))
    return order, norms


def _ends(span: Span, seen: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
    firsts = [p for p in span.projections if p.role not in ("output", "down")]
    if span.kind == "cross-attention":
        firsts = list(span.roles("query"))
    lasts = span.roles("output", "down")
    first = span.module if span.experts else (firsts[0].module if firsts else None)
    last = span.module if span.experts else (lasts[0].module if lasts else None)
    if first not in seen or last not in seen:
        return None
    return seen[first][0], seen[last][1]


def _feeds(norm: str, start: Tensor, seen: dict[str, Any], walls: list[Tensor]) -> bool:
    """Whether the norm's output reaches the span's input with no other span or sum between."""
    others = [w for w in walls if w is not seen[norm][1]]
    return start.grad_fn is seen[norm][1].grad_fn or _reaches(start, [seen[norm][1]], others)


def _reads_sum(norm: str, end: Tensor, seen: dict[str, Any], outer: list[str]) -> bool:
    walls = [seen[other][1] for other in outer if other != norm]
    return _reaches(seen[norm][0], [end], walls)
