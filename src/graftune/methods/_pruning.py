"""Structural pruning: a narrow body's blocks as those rows and columns of a wide one's that matter.

One set of features for the residual stream, since blocks add to it; in each attention one set of
places inside a head, the same in all heads, so that queries meet their keys; in each feed-forward
one set of hidden units. Importance of a row or column is the sum over its entries: |w|, or the mean
squared gradient. Keys that are rotated keep every r-th place: those have the angles of a head of
1/r of the size. Sung, Cho, Bansal 2022, arXiv 2206.06522, section 3.3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from graftune.anatomy import Block, Projection, Span
from graftune.anatomy.fused import head_size
from graftune.anatomy.modules import parent
from graftune.errors import SettingsError
from graftune.methods._side import Narrow
from graftune.sites import hosts

Importance = Callable[[str, Tensor], Tensor]
"""Takes a tensor's absolute name and the tensor, returns how much each entry matters."""
_READS = ("query", "key", "value", "up", "gate")


def magnitude(name: str, tensor: Tensor) -> Tensor:
    """Returns |w|."""
    return tensor.abs()


def prune_into(
    method: str,
    model: nn.Module,
    blocks: Sequence[Block],
    narrow: Narrow,
    by: int,
    importance: Importance,
) -> None:
    """Gives a narrow body's blocks what matters of wide ones.

    Args:
        method: for errors.
        model: whose blocks are pruned.
        blocks: those that the body has a block for.
        narrow: of the same class, each width divided.
        by: what widths are divided by.
        importance: of a tensor's entries.

    Raises:
        SettingsError: weights that are quantised, or experts'.
    """
    body, own = narrow
    for block in blocks:
        _check(method, model, block)
    kept = _top(sum(_residual(model, block, importance) for block in blocks), own[0].width)
    rotated = any("rotary" in name for name, _ in body.named_modules())
    with torch.no_grad():
        for wide, small in zip(blocks, own, strict=True):
            for one, other in zip(wide.spans, small.spans, strict=True):
                inner = _inner(model, one, by, importance, rotated)
                _copy_span(model, one, body, other, kept, inner)
            _copy_rest(model, wide, body, small, kept, by)


def _check(method: str, model: nn.Module, block: Block) -> None:
    for span in block.spans:
        if span.experts or any(part.parameter != "weight" for part in span.projections):
            raise SettingsError(
                f"{method}: {block.path} has experts, which can't be pruned into narrow ones here: "
                'set init="random".'
            )
        for part in span.projections:
            if hosts.is_quantised(model.get_submodule(part.module)):
                raise SettingsError(
                    f"{method}: {part.module} is quantised, so its weights can't be pruned: set "
                    'init="random", or load the base in 16 or 32 bit.'
                )


def _weight(model: nn.Module, part: Projection) -> Tensor:
    """Returns a role's rows of a weight, `(out, in)`."""
    weight = hosts.read(model.get_submodule(part.module)).detach()
    return weight[_rows(part, weight.device)]


def _scores(model: nn.Module, part: Projection, importance: Importance) -> Tensor:
    """Returns how much each entry of a role's rows matters, `(out, in)`, float32."""
    host: Any = model.get_submodule(part.module)
    found = hosts.oriented(host, importance(f"{part.module}.weight", host.weight.detach()))
    return found[_rows(part, found.device)].float()


def _residual(model: nn.Module, block: Block, importance: Importance) -> Tensor:
    """Returns how much each feature of the residual stream matters to a block, `(d,)`."""
    found = [
        _scores(model, part, importance).sum(0 if part.role in _READS else 1)
        for span in block.spans
        for part in span.projections
        if part.role != "other"
    ]
    return torch.stack([one for one in found if len(one) == block.width]).sum(0)


def _inner(
    model: nn.Module, span: Span, by: int, importance: Importance, rotated: bool
) -> dict[str, Tensor]:
    """Returns which inner features of a span stay, by role."""
    roles = ("up", "gate", "down") if span.kind == "ffn" else ("query", "key", "value", "output")
    parts = span.roles(*roles)
    scores = [
        _scores(model, part, importance).sum(1 if part.role in _READS else 0) for part in parts
    ]
    if span.kind == "ffn":
        kept = _top(torch.stack(scores).sum(0), len(scores[0]) // by)
        return {part.role: kept for part in parts}
    size = head_size(model.get_submodule(parent(parts[0].module)))
    total = torch.stack([one.view(-1, size).sum(0) for one in scores]).sum(0)
    places = torch.arange(0, size, by, device=total.device) if rotated else _top(total, size // by)
    return {
        part.role: (torch.arange(0, len(one), size, device=one.device)[:, None] + places).flatten()
        for part, one in zip(parts, scores, strict=True)
    }


def _top(scores: Any, count: int) -> Tensor:
    """Returns where the largest are, in order."""
    assert isinstance(scores, Tensor)
    return scores.topk(count).indices.sort().values


def _copy_span(
    model: nn.Module,
    wide: Span,
    body: nn.Module,
    narrow: Span,
    kept: Tensor,
    inner: dict[str, Tensor],
) -> None:
    for part, other in zip(wide.projections, narrow.projections, strict=True):
        if part.role == "other":
            continue
        reads = part.role in _READS
        rows, columns = (inner[part.role], kept) if reads else (kept, inner[part.role])
        weight = _weight(model, part)[rows][:, columns]
        host: Any = body.get_submodule(other.module)
        at = _rows(other, host.weight.device)
        hosts.oriented(host, host.weight)[at] = weight.to(host.weight)
        source: Any = model.get_submodule(part.module)
        if isinstance(getattr(host, "bias", None), Tensor):
            bias = source.bias.detach()
            host.bias[at] = bias[_rows(part, bias.device)][rows].to(host.bias)


def _rows(part: Projection, device: Any) -> Any:
    """Returns what picks a role's rows out of its module's."""
    return slice(None) if part.rows is None else hosts.row_index(part.rows, device)


def _copy_rest(
    model: nn.Module, wide: Block, body: nn.Module, narrow: Block, kept: Tensor, by: int
) -> None:
    """Copies norms and what else a block has: vectors of the residual stream, and equal shapes."""
    done = {f"{part.module}." for span in narrow.spans for part in span.projections}
    sources = dict(model.get_submodule(wide.path).named_parameters())
    for name, tensor in body.get_submodule(narrow.path).named_parameters():
        if any(f"{narrow.path}.{name}".startswith(path) for path in done):
            continue
        source = sources.get(name)
        if source is None:
            continue
        if source.shape == tensor.shape:
            tensor.copy_(source)
        elif source.ndim == 1 and len(source) == wide.width:
            tensor.copy_(source[kept])
        elif source.ndim == 1 and len(source) == by * len(tensor):  # of a head: every r-th place
            tensor.copy_(source[::by])
