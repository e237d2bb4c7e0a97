"""How LoRA's A and B start: A random and B zero, or both from the weight; from data, see `_eva`."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from graftune.anatomy import Projection
from graftune.errors import SettingsError
from graftune.methods import _low_rank as low_rank
from graftune.sites import hosts

FROM_WEIGHT = ("pissa", "olora")
"""Starts whose change is counted from where it starts."""
STARTS = ("zero-B", "gaussian", *FROM_WEIGHT, "eva", "loftq")


def check(init: str, with_more: bool, alpha: float | None) -> None:
    """Raises SettingsError for a start that other settings rule out.

    Args:
        init: the start asked for.
        with_more: whether dora or lora_bias is asked for too.
        alpha: the scale's numerator.
    """
    if init in (*FROM_WEIGHT, "loftq") and with_more:
        raise SettingsError(f'LoRA: init "{init}" goes with neither dora nor lora_bias.')
    if init in ("pissa", "loftq") and alpha == 0:
        raise SettingsError(f'LoRA: init "{init}" divides by alpha, which is 0.')


def reserve(delta: low_rank.LowRank, init: str) -> None:
    """Makes room for what a file will fill."""
    if init in FROM_WEIGHT:
        delta.start_from_here()
    if isinstance(delta, low_rank.Magnitude):
        delta.m = nn.Parameter(delta.B.new_empty(delta.B.shape[0]))


@torch.no_grad()
def start(delta: low_rank.LowRank, init: str, host: nn.Module, projection: Projection) -> None:
    """Gives a change its initial values.

    Raises:
        SettingsError: the start needs a linear map.
    """
    kind = hosts.kind_of(host)
    if kind == "embedding":
        nn.init.zeros_(delta.A)
        nn.init.normal_(delta.B)
    elif init == "gaussian":
        nn.init.normal_(delta.A, std=1 / delta.A.shape[0])
        nn.init.zeros_(delta.B)
    else:
        nn.init.kaiming_uniform_(delta.A, a=math.sqrt(5))
        nn.init.zeros_(delta.B)
    if init in FROM_WEIGHT:
        if kind != "linear":
            raise SettingsError(
                f'LoRA: init "{init}" needs a linear map, but {projection.module} is of '
                f"kind {kind}."
            )
        start_from_weight(init, delta, rows_of(hosts.read(host), projection))
    if isinstance(delta, low_rank.Magnitude):
        delta.set_magnitude(rows_of(hosts.read(host), projection))


@torch.no_grad()
def start_experts(A: Tensor, B: Tensor, init: str) -> None:
    """Gives the changes of experts, A `(experts, r, in)`, their initial values."""
    if init == "gaussian":
        nn.init.normal_(A, std=1 / A.shape[1])
    else:
        bound = 1 / math.sqrt(A.shape[2])
        nn.init.uniform_(A, -bound, bound)
    nn.init.zeros_(B)


def start_from_weight(init: str, delta: low_rank.LowRank, weight: Tensor) -> None:
    """Starts A and B from W, `(out, in)`: its top singular directions, or its first QR columns."""
    r = delta.A.shape[0]
    wide = weight.float()
    if init == "pissa":
        _start_from_svd(delta, wide)
    else:
        Q, R = torch.linalg.qr(wide)
        delta.A.copy_(R[:r])
        delta.B.copy_(Q[:, :r])
    delta.start_from_here()


@torch.no_grad()
def start_from_residual(delta: low_rank.LowRank, lost: Tensor, projection: Projection) -> None:
    """Starts A and B so that s B A is the best of their rank of what quantising lost (LoftQ)."""
    _start_from_svd(delta, rows_of(lost, projection))


def _start_from_svd(delta: low_rank.LowRank, matrix: Tensor) -> None:
    U, S, V = torch.linalg.svd(matrix, full_matrices=False)
    r = delta.A.shape[0]
    root = torch.sqrt(S[:r] / delta.scale)
    delta.A.copy_(root[:, None] * V[:r])
    delta.B.copy_(U[:, :r] * root)


def indices(projection: Projection, device: torch.device) -> Tensor | None:
    """Returns the output features of a slice, None of a whole module."""
    rows = projection.rows
    return None if rows is None else hosts.row_index(rows, device)


def rows_of(weight: Tensor, projection: Projection) -> Tensor:
    """Returns the rows of a weight, `(out, in, ...)`, that belong to a projection."""
    index = indices(projection, weight.device)
    return weight if index is None else weight[index]
