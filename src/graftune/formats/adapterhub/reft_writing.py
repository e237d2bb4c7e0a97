"""ReFTs of ours in AdapterHub's form; `reft` says what its tensors mean.

A DiReFT is written as the NoReFT (or LoReFT) that computes the same, since AdapterHub's settings
can't say which it is:  W h + b = (W + R) h + b - R h.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graftune.errors import FormatError
from graftune.formats.adapterhub import paths
from graftune.formats.adapterhub.bottleneck_writing import activation_name
from graftune.formats.adapterhub.reft import BASE, ORIGINAL
from graftune.methods.reft import Intervention, ReftDelta, ReftMethod

if TYPE_CHECKING:
    from graftune.adapter import Adapter


def content(adapter: Adapter) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """Returns settings and tensors; None if it has no interventions.

    Raises:
        FormatError: AdapterHub can't compute it; the message says why.
    """
    method = adapter.method
    if not isinstance(method, ReftMethod):
        return None
    if not method.subtracts and method.activation != "identity":
        raise FormatError(
            f"AdapterHub loads every DiReFT as a NoReFT, which can be the same function without an "
            f'activation alone, found "{method.activation}".'
        )
    blocks = {block.path: block for block in adapter.anatomy.blocks}
    chosen, tensors = set[int](), dict[str, Tensor]()
    for graft in adapter.grafts:
        if isinstance(graft.delta, ReftDelta):
            block = blocks[graft.place.module]
            chosen.add(block.index)
            home = f"{paths.reft_home(adapter.anatomy, block)}.refts.{adapter.name}.units"
            tensors |= {f"{home}.{name}": t for name, t in _units(method, graft.delta).items()}
    return _settings(method, sorted(chosen), len(blocks)), tensors


def _settings(method: ReftMethod, chosen: list[int], blocks: int) -> dict[str, Any]:
    name = None if method.activation == "identity" else activation_name(method.activation)
    return {
        "architecture": "reft",
        "dropout": method.dropout,
        "dtype": None,
        "init_weights_seed": None,
        "layers": "all" if len(chosen) == blocks else chosen,
        "non_linearity": name,
        "orthogonality": method.is_orthonormal,
        "output_reft": True,
        "prefix_positions": method.prefix_positions,
        "r": method.r,
        "suffix_positions": method.suffix_positions,
        "tied_weights": method.tied,
    }


def _units(method: ReftMethod, delta: ReftDelta) -> dict[str, Tensor]:
    """Returns the tensors of a block; one without tokens, which AdapterHub has, as the other."""
    own: dict[str, Any] = dict(delta.named_children())
    names = ("both",) if method.tied else ("first", "last")
    some = next(iter(own.values()))
    return {
        f"{number}.{name}": tensor
        for number, unit in enumerate(own.get(name, some) for name in names)
        for name, tensor in _unit(method, unit).items()
    }


@torch.no_grad()
def _unit(method: ReftMethod, unit: Intervention) -> dict[str, Tensor]:
    R = unit.R()
    W = unit.W if method.subtracts else unit.W + R
    source = {"learned_source.weight": W.clone(), "learned_source.bias": unit.b.clone()}
    if not method.is_orthonormal:
        return source | {"projection.weight": R.clone()}
    return source | {ORIGINAL: -torch.eye(*R.shape), BASE: _completed(R)}


def _completed(R: Tensor) -> Tensor:
    """Returns an orthogonal (d, d) whose first columns are the rows of R; R itself if square."""
    if R.shape[0] == R.shape[1]:
        return R.clone()
    Q = torch.linalg.qr(R.mT, mode="complete").Q
    return torch.cat([R.mT, Q[:, len(R) :]], dim=1)
