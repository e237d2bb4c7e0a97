"""Low-rank changes in the form files hold them: one A and one B for a whole module or tensor.

In memory a change may sit on slices of a fused module, or be counted from a start that isn't zero
(PiSSA, OLoRA). Both are ordinary LoRAs of a higher rank:

    slices of rows R1, R2       A = [A1; A2]      B = [B1 in rows R1 | B2 in rows R2], else 0
    a start A0, B0              A = [A; A0]       B = [B | -B0]

so HF PEFT and servers compute the same from the file; the way back is a cut at known places.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from graftune.methods import _low_rank as low_rank
from graftune.sites import hosts
from graftune.sites.base import Graft, LinearPlace, ParameterPlace


@dataclasses.dataclass(frozen=True, kw_only=True)
class Factors:
    """The change of one tensor.

    Shapes: A (rank, in, *kernel), B (out, rank, 1, ...), of experts (experts, rank, in) and
    (experts, out, rank); bias and magnitude (out,).
    """

    module: str
    parameter: str
    A: Tensor
    B: Tensor
    scale: float
    bias: Tensor | None = None
    magnitude: Tensor | None = None

    @property
    def of_experts(self) -> bool:
        """Whether the tensor is a stack of experts' weights."""
        return self.parameter != "weight"

    @property
    def rank(self) -> int:
        """Rank as files count it."""
        return self.A.shape[1 if self.of_experts else 0]

    @property
    def name(self) -> str:
        """What patterns are held against: the module, or an expert tensor's own name."""
        return f"{self.module}.{self.parameter}" if self.of_experts else self.module


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slice:
    """Part of a module's output features, changed on its own."""

    role: str
    rows: tuple[tuple[int, int], ...]
    rank: int
    """Rank its part has in the file."""

    @property
    def index(self) -> Tensor:
        """Returns the features, (rows,) int64."""
        return hosts.row_index(self.rows)


def low_rank_grafts(grafts: Iterable[Graft]) -> dict[tuple[str, str], list[Graft]]:
    """Returns the grafts that are low-rank changes, by (module, parameter)."""
    found: dict[tuple[str, str], list[Graft]] = {}
    for graft in grafts:
        if isinstance(graft.delta, low_rank.LowRank | low_rank.LowRankExperts):
            found.setdefault((graft.place.module, graft.place.parameter), []).append(graft)
    return found


def slices(grafts: Iterable[Graft]) -> dict[str, list[Slice]]:
    """Returns the slices of every module that isn't changed as a whole, by name."""
    found: dict[str, list[Slice]] = {}
    for (module, parameter), group in low_rank_grafts(grafts).items():
        name = module if parameter == "weight" else f"{module}.{parameter}"
        for graft in group:
            rows = _rows(graft)
            if rows is not None:
                A, _ = _plain(graft.delta)
                rank = A.shape[0 if isinstance(graft.delta, low_rank.LowRank) else 1]
                role = getattr(graft.place, "role", "")
                found.setdefault(name, []).append(Slice(role=role, rows=rows, rank=rank))
    return found


def whole(model: nn.Module, grafts: Iterable[Graft]) -> list[Factors]:
    """Returns every low-rank change as one of its whole module or tensor."""
    groups = low_rank_grafts(grafts)
    return [_whole(model.get_submodule(place[0]), group) for place, group in groups.items()]


def cut(factors: Factors, parts: Sequence[Slice]) -> list[tuple[Slice | None, Factors]]:
    """Returns the changes that `whole` put together; one, with no slice, if there are no parts."""
    if not parts:
        return [(None, factors)]
    found: list[tuple[Slice | None, Factors]] = []
    start, dim = 0, 1 if factors.of_experts else 0
    for part in parts:
        index, stop = part.index, start + part.rank
        found.append(
            (
                part,
                dataclasses.replace(
                    factors,
                    A=factors.A.narrow(dim, start, part.rank),
                    B=factors.B.narrow(dim + 1, start, part.rank).index_select(dim, index),
                    bias=None if factors.bias is None else factors.bias[index],
                    magnitude=None if factors.magnitude is None else factors.magnitude[index],
                ),
            )
        )
        start = stop
    return found


def graft(
    host: nn.Module,
    factors: Factors,
    part: Slice | None = None,
    *,
    dropout: float = 0.0,
    from_start: bool = False,
    is_gated: bool = False,
) -> Graft:
    """Returns a change as it acts on a model, its tensors copied to the host's device.

    Args:
        host: the module it acts on.
        factors: the change, of the slice alone if there is one.
        part: the slice of the host's outputs it is of.
        dropout: as the method has it.
        is_gated: give it room for a gate.
        from_start: the second half of A and B is the start from which the change is counted.
    """
    options: Mapping[str, Any] = hosts.delta_options(host, factors.parameter)
    A, B = factors.A.to(**options, copy=True), factors.B.to(**options, copy=True)
    if factors.of_experts:
        turned = hosts.has_turned_experts(host)
        index = None if part is None else part.index.to(A.device)
        experts = low_rank.LowRankExperts(A, B, factors.scale, index, turned)
        return Graft(ParameterPlace(factors.module, factors.parameter), experts)
    kind = _KINDS[hosts.kind_of(host), factors.magnitude is not None]
    kind = low_rank.GatedLowRank if is_gated else kind
    r = A.shape[0] // 2 if from_start else A.shape[0]
    first = (A[:r].clone(), B[:, :r].contiguous()) if from_start else (A, B)
    delta = kind(*first, factors.scale, dropout, factors.bias is not None)
    if from_start:
        delta.start_from_here()
        delta.A0, delta.B0 = A[r:].clone(), -B[:, r:]
    _fill(delta, factors, part, options)
    rows = None if part is None else part.rows
    role = "output" if part is None else part.role
    return Graft(LinearPlace(factors.module, role, rows), delta)


def file_tensors(model: nn.Module, found: Sequence[Factors]) -> dict[str, Tensor]:
    """Returns the tensors of low-rank changes under HF PEFT's names, without its prefix."""
    tensors: dict[str, Tensor] = {}
    for factors in found:
        host = model.get_submodule(factors.module)
        if factors.of_experts:
            tensors |= _expert_tensors(factors, nesting(model, factors, found))
            continue
        kind = hosts.kind_of(host)
        form = "lora_embedding_{}" if kind == "embedding" else "lora_{}.weight"
        tensors[f"{factors.module}.{form.format('A')}"] = factors.A
        tensors[f"{factors.module}.{form.format('B')}"] = factors.B
        if factors.bias is not None:
            tensors[f"{factors.module}.lora_B.bias"] = factors.bias
        if factors.magnitude is not None:
            shape = (1, -1, *[1] * (factors.A.ndim - 2)) if kind == "conv" else (-1,)
            key = f"{factors.module}.lora_magnitude_vector"
            tensors[key] = factors.magnitude.reshape(shape)
    return tensors


def expert_factors(A: Tensor, B: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Returns A (experts, rank, in) and B (experts, out, rank) from a file's two matrices."""
    A = A.reshape(experts, -1, A.shape[1])
    return A, B.reshape(B.shape[0], -1, experts).permute(2, 0, 1)


def nesting(model: nn.Module, factors: Factors, found: Iterable[Factors]) -> int:
    """Returns how many `base_layer.` PEFT puts before the tensors of one of several parameters.

    It wraps a module once for each of its targeted tensors, in the module's order, so that the
    last one lies outermost.
    """
    order = [
        name for name, _ in model.get_submodule(factors.module).named_parameters(recurse=False)
    ]
    own = order.index(factors.parameter)
    others = {f.parameter for f in found if f.module == factors.module and f.of_experts}
    return sum(order.index(name) > own for name in others)


_KINDS: dict[tuple[str, bool], type[low_rank.LowRank]] = {
    ("linear", False): low_rank.LowRank,
    ("embedding", False): low_rank.LowRankEmbedding,
    ("conv", False): low_rank.LowRankConv,
    ("linear", True): low_rank.Magnitude,
    ("embedding", True): low_rank.MagnitudeEmbedding,
    ("conv", True): low_rank.MagnitudeConv,
}


def _fill(
    delta: low_rank.LowRank, factors: Factors, part: Slice | None, options: Mapping[str, Any]
) -> None:
    if factors.bias is not None:
        delta.bias = nn.Parameter(factors.bias.to(**options, copy=True))
    if isinstance(delta, low_rank.Magnitude):
        assert factors.magnitude is not None
        delta.m = nn.Parameter(factors.magnitude.reshape(-1).to(**options, copy=True))
        if part is not None:
            delta.index = part.index.to(delta.m.device)


def _plain(delta: nn.Module) -> tuple[Tensor, Tensor]:
    """Returns A and B of one delta, its start put in."""
    assert isinstance(delta, low_rank.LowRank | low_rank.LowRankExperts)
    A, B = delta.A.detach(), delta.B.detach()
    if isinstance(delta, low_rank.LowRank) and delta.A0 is not None and delta.B0 is not None:
        return torch.cat([A, delta.A0]), torch.cat([B, -delta.B0], 1)
    return A, B


def _rows(graft: Graft) -> tuple[tuple[int, int], ...] | None:
    if isinstance(graft.place, LinearPlace):
        return graft.place.rows
    index = getattr(graft.delta, "index", None)
    return None if index is None else _runs(index.tolist())


def _runs(index: Sequence[int]) -> tuple[tuple[int, int], ...]:
    runs: list[tuple[int, int]] = []
    for at in index:
        if runs and runs[-1][1] == at:
            runs[-1] = (runs[-1][0], at + 1)
        else:
            runs.append((at, at + 1))
    return tuple(runs)


def _whole(host: nn.Module, group: Sequence[Graft]) -> Factors:
    place, first = group[0].place, group[0].delta
    assert isinstance(first, low_rank.LowRank | low_rank.LowRankExperts)
    parts = [(_rows(graft), *_plain(graft.delta)) for graft in group]
    experts = isinstance(first, low_rank.LowRankExperts)
    dim = 1 if experts else 0
    A = torch.cat([a for _, a, _ in parts], dim)
    out = _height(host, place.parameter, experts)
    B = torch.cat([_padded(b, rows, out, dim) for rows, _, b in parts], dim + 1)
    bias = magnitude = None
    if isinstance(first, low_rank.LowRank) and first.bias is not None:
        bias = first.bias.new_zeros(out)
        _scatter(bias, group, "bias")
    if isinstance(first, low_rank.Magnitude):
        magnitude = hosts.read(host).detach().to(first.m.dtype).flatten(1).norm(dim=1)
        _scatter(magnitude, group, "m")
    return Factors(
        module=place.module,
        parameter=place.parameter,
        A=A,
        B=B,
        scale=first.scale,
        bias=bias,
        magnitude=magnitude,
    )


def _scatter(into: Tensor, group: Sequence[Graft], name: str) -> None:
    for graft in group:
        rows, values = _rows(graft), getattr(graft.delta, name).detach()
        into[slice(None) if rows is None else hosts.row_index(rows)] = values


def _padded(B: Tensor, rows: tuple[tuple[int, int], ...] | None, out: int, dim: int) -> Tensor:
    if rows is None:
        return B
    shape = list(B.shape)
    shape[dim] = out
    return B.new_zeros(shape).index_copy(dim, hosts.row_index(rows, B.device), B)


def _height(host: nn.Module, parameter: str, experts: bool) -> int:
    return hosts.expert_sizes(host, parameter)[1] if experts else hosts.features(host)[1]


def _expert_tensors(factors: Factors, depth: int) -> dict[str, Tensor]:
    at = f"{factors.module}.{'base_layer.' * depth}"
    A, B = factors.A.flatten(0, 1), factors.B.permute(1, 2, 0).flatten(1)
    return {f"{at}lora_A.weight": A, f"{at}lora_B.weight": B}
