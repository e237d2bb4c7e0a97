"""LoRA, DoRA and (IA)^3 of ours in AdapterHub's form; `lora` and `ia3` say what that computes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from graftune.anatomy.parts import Block, Projection
from graftune.errors import FormatError
from graftune.formats.adapterhub import paths
from graftune.formats.adapterhub.low_rank import GATE
from graftune.methods._low_rank import LowRank, LowRankConv, LowRankEmbedding, Magnitude
from graftune.methods.ia3 import IA3, ScaledOutput
from graftune.methods.lora import LoRA
from graftune.sites import hosts
from graftune.sites.base import Graft, LinearPlace
from graftune.sites.parameter import OwnValue

if TYPE_CHECKING:
    from graftune.adapter import Adapter

_LETTERS = {"query": "q", "key": "k", "value": "v"}
_UNUSED: dict[str, Any] = {
    "dtype": None,
    "init_weights_seed": None,
    "vera_b": None,
    "vera_d": None,
}


class _Part(NamedTuple):
    """One role's share of what hangs on a linear."""

    block: Block
    part: Projection
    graft: Graft
    rows: Tensor | None
    """Rows of the graft's outputs that are the role's; None for all."""


def content(adapter: Adapter) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """Returns settings and tensors; None if the method is another.

    Raises:
        FormatError: AdapterHub can't compute it; the message says why.
    """
    method = adapter.method
    if not isinstance(method, LoRA | IA3):
        return None
    parts = list(_parts(adapter))
    check_gate(method.gate)
    settings = {**_UNUSED, **_places(adapter, parts), "use_gating": method.gate is not None}
    if isinstance(method, IA3):
        own: dict[str, Any] = {"alpha": 1, "composition_mode": "scale", "dropout": 0.0, "r": 1}
        own |= {"init_weights": "ia3", "use_dora": False}
        return settings | own, _tensors(adapter, parts, _scales)
    r, scale = _rank(parts)
    if method.gate is not None:
        if scale != 1:
            raise FormatError("its gates multiply the scaled change (gate_times_scale).")
        scale = 1 if method.alpha is None else method.alpha / r
    own = {"alpha": _whole(scale * r), "composition_mode": "add", "dropout": method.dropout, "r": r}
    own |= {"init_weights": "lora", "use_dora": method.dora}
    return settings | own, _tensors(adapter, parts, _factors)


def check_gate(gate: str | None) -> None:
    """Raises FormatError unless AdapterHub has such a gate."""
    if gate not in (None, "mean-padded"):
        raise FormatError(
            f'its gates are of kind "{gate}", and AdapterHub\'s are means over all tokens, padding '
            'too: gate="mean-padded".'
        )


def _parts(adapter: Adapter) -> Iterator[_Part]:
    """Yields every role of every linear that an adapter changes, in the order of q, k, v."""
    own = [graft for graft in adapter.grafts if not isinstance(graft.delta, OwnValue)]
    known = {
        (part.module, part.rows): (block, part)
        for block in adapter.anatomy.blocks
        for span in block.spans
        for part in span.projections
    }
    for graft in own:
        place = graft.place
        fits = isinstance(place, LinearPlace) and place.side == "output"
        found = [pair for key, pair in known.items() if fits and _covers(place, key[0], key[1])]
        if not found or isinstance(graft.delta, LowRankEmbedding | LowRankConv):
            raise FormatError(f"AdapterHub can't change {place.key} so.")
        for block, part in found:
            yield _Part(block, part, graft, _share(place, part))


def _covers(place: Any, module: str, rows: Any) -> bool:
    return place.module == module and place.rows in (None, rows)


def _share(place: Any, part: Projection) -> Tensor | None:
    return None if place.rows is not None or part.rows is None else hosts.row_index(part.rows)


def _places(adapter: Adapter, parts: Sequence[_Part]) -> dict[str, Any]:
    """Returns the settings that say which linears are changed.

    Raises:
        FormatError: AdapterHub's settings can't say it.
    """
    roles = {found.part.role for found in parts}
    flags = paths.feed_flags(adapter.anatomy.model_type)
    strange = roles - _LETTERS.keys() - flags.keys()
    if strange:
        raise FormatError(
            f"it changes {', '.join(sorted(strange))}, and AdapterHub's settings know "
            f"{', '.join((*_LETTERS, *flags))} alone."
        )
    chosen = {found.block.index for found in parts}
    meant = {
        (part.module, part.rows)
        for block in adapter.anatomy.blocks
        for span in block.spans
        for part in span.projections
        if block.index in chosen and part.role in roles
    }
    if meant != {(found.part.module, found.part.rows) for found in parts}:
        raise FormatError(
            "it changes other linears in some blocks than in others, which AdapterHub's settings "
            "can't say."
        )
    letters = [letter for role, letter in _LETTERS.items() if role in roles]
    return {
        "architecture": "lora",
        "attn_matrices": letters,
        "leave_out": paths.left_out(adapter.anatomy, {found.part.module for found in parts}),
        "selfattn_lora": bool(letters),
        **{flag: role in roles for role, flag in flags.items()},
    }


def _rank(parts: Sequence[_Part]) -> tuple[int, float]:
    """Returns the rank and the scale that all linears have."""
    deltas = [found.graft.delta for found in parts]
    pairs = {(_plain(delta)[0].shape[0], float(delta.scale)) for delta in deltas}  # type: ignore[arg-type]
    if len(pairs) > 1:
        raise FormatError("its ranks or scales differ between linears, and AdapterHub has one.")
    return pairs.pop()


def _whole(number: float) -> float | int:
    return int(number) if number == int(number) else number


def _tensors(adapter: Adapter, parts: Sequence[_Part], make: Any) -> dict[str, Tensor]:
    """Returns tensors by AdapterHub's names, those of one module's roles stacked."""
    found: dict[str, list[Tensor]] = {}
    order = [*_LETTERS, "up", "down"]
    for one in sorted(parts, key=lambda found: order.index(found.part.role)):
        home = paths.linear_home(adapter.anatomy, one.block, one.part)
        for name, tensor in make(adapter.model, one).items():
            found.setdefault(f"{home}.loras.{adapter.name}.{name}", []).append(tensor)
    return {name: torch.cat(tensors) for name, tensors in found.items()}


def _scales(model: nn.Module, one: _Part) -> dict[str, Tensor]:
    assert isinstance(one.graft.delta, ScaledOutput)
    l = one.graft.delta.l.detach()  # noqa: E741 - the paper's letter
    return {"lora_B": (l if one.rows is None else l[one.rows]).reshape(-1, 1), **_gate(one)}


def _gate(one: _Part) -> dict[str, Tensor]:
    """Returns the tensors of a gate; none where there is none."""
    return {name: t for name, t in one.graft.delta.state_dict().items() if name in GATE}


def _factors(model: nn.Module, one: _Part) -> dict[str, Tensor]:
    delta = one.graft.delta
    assert isinstance(delta, LowRank)
    A, B = _plain(delta)
    if isinstance(delta, Magnitude):
        return {"lora_A": A, "lora_B": B, "m.weight": _magnitude(model, one, delta)}
    if delta.bias is not None:
        raise FormatError("B has a bias of its own (lora_bias), which AdapterHub has not.")
    return {"lora_A": A, "lora_B": B if one.rows is None else B[one.rows], **_gate(one)}


def _plain(delta: LowRank) -> tuple[Tensor, Tensor]:
    """Returns A and B, a start that the change is counted from put in."""
    A, B = delta.A.detach(), delta.B.detach()
    if delta.A0 is None or delta.B0 is None:
        return A, B
    return torch.cat([A, delta.A0]), torch.cat([B, -delta.B0], 1)


def _magnitude(model: nn.Module, one: _Part, delta: Magnitude) -> Tensor:
    """Returns AdapterHub's m, `(out, 1)`.

    Raises:
        FormatError: it turns the bias, which ours leaves as it is.
    """
    host = model.get_submodule(one.part.module)
    if one.part.rows is not None:
        raise FormatError("AdapterHub has no DoRA on linears that hold several roles.")
    weight = hosts.read(host).detach()
    f = delta.m.detach() / delta.norm(weight)
    bias = host._parameters.get("bias")
    own = torch.zeros_like(f) if delta.bias is None else delta.bias.detach()
    wanted = torch.zeros_like(f) if bias is None else (1 - 1 / f) * bias.detach() / delta.scale
    if not torch.allclose(own, wanted, atol=1e-6, rtol=1e-5):
        raise FormatError("AdapterHub's DoRA turns a linear's bias too, and this one doesn't.")
    return (f * (weight + delta.B.detach() @ delta.A.detach()).norm(dim=1)).reshape(-1, 1)
