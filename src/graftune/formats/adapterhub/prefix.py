"""Prefix tuning by AdapterHub, its MLP or flat: read as the keys and values that come of it.

    MLP    T = W2 act(W1 E + c1) + c2       E = wte, W1, c1 = control_trans.0, W2, c2 = .2
    flat   T = control_trans
    T (P, layers, 2, kv)                    [.., 0] keys, [.., 1] values; without layers left out

One T for each location: the decoder's or only stack's attention (self_prefix), an encoder's
(encoder_prefix), and cross-attention (cross_prefix). The MLP is a way of training and is dropped,
so that training goes on with the prefix itself. Gates multiply keys and values by means over all
tokens of what the attention is given: one for both, or (not shared_gating) one each. In T5 the
relative positions of real keys are those that they would have behind the prefix (`shift_keys`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from graftune.anatomy import Anatomy
from graftune.anatomy.modules import is_in
from graftune.anatomy.parts import Stack
from graftune.errors import BaseMismatchError, FormatError
from graftune.formats.adapterhub import paths
from graftune.formats.adapterhub.base import Kind, Reading
from graftune.formats.adapterhub.bottleneck import activation
from graftune.formats.adapterhub.names import block_at, span_of
from graftune.formats.filling import fill
from graftune.formats.tensors import listed
from graftune.methods._maps import ACTIVATIONS
from graftune.methods._prefix import PrefixValues
from graftune.methods.base import Method
from graftune.methods.prefix import KINDS, PrefixTuning
from graftune.sites.base import AttentionPlace, Graft, Place

_NAME = re.compile(
    r"(?:.+\.)?prefix_tuning\.prefix_tunings\.(?P<name>[^.]+)\.(?P<location>[^.]+)\.(?P<tensor>.+)"
)
_GATE = re.compile(
    r"(?P<module>.+?)\.prefix_tuning\.prefix_gates\.(?P<name>[^.]+)\.(?P<tensor>weight|bias)"
)
FLAT = "control_trans"
"""The one tensor of a flat prefix."""
_W1, _W2 = f"{FLAT}.0", f"{FLAT}.2"


class Prefix(Kind):
    """See the module."""

    name = "prefix tuning"
    holder = "prefix_tuning"
    in_every_block = False
    defaults = {  # noqa: RUF012
        "bottleneck_size": 512,
        "cross_prefix": True,
        "dropout": 0.0,
        "encoder_prefix": True,
        "flat": False,
        "non_linearity": "tanh",
        "prefix_length": 30,
        "shared_gating": True,
        "use_gating": False,
    }
    without_effect = ("init_weights_seed",)

    def reads(self, settings: Mapping[str, Any]) -> bool:
        """See `Kind.reads`."""
        return settings.get("architecture") == "prefix_tuning"

    def planned(self, reading: Reading, heads: Sequence[str]) -> tuple[Method, list[Graft]]:
        """See `Kind.planned`."""
        config = reading.config
        method = PrefixTuning(
            length=config["prefix_length"],
            hidden=None,
            sublayers=KINDS if config["cross_prefix"] else KINDS[:1],
            dropout=config["dropout"],
            gate="mean-padded" if config["use_gating"] else None,
            shared_gate=bool(config["shared_gating"]),
            shift_keys=reading.anatomy.model_type in paths.LIKE_T5,
            layers=_layers(reading),
            train_head=tuple(heads) or False,
        )
        grafts = method.plan(reading.model, reading.anatomy, empty=True)
        fill(grafts, _named(reading, grafts), reading.where, reading.folder)
        return method, grafts


def _layers(reading: Reading) -> tuple[int, ...] | None:
    """Returns the blocks that have a prefix, None for all."""
    if reading.config["encoder_prefix"]:
        return reading.layers
    encoders = [stack for stack in reading.anatomy.stacks if _is_encoder(reading.anatomy, stack)]
    out = {*reading.config["leave_out"], *(b.index for stack in encoders for b in stack.blocks)}
    return tuple(b.index for b in reading.anatomy.blocks if b.index not in out) if out else None


def _is_encoder(anatomy: Anatomy, stack: Stack) -> bool:
    """Whether a stack is what AdapterHub calls an encoder: one beside a decoder, or T5's."""
    beside = len(anatomy.stacks) > 1 or anatomy.model_type in paths.LIKE_T5
    return stack.kind == "encoder" and beside


def _named(reading: Reading, grafts: Sequence[Graft]) -> dict[str, Tensor]:
    """Returns a file's prefixes under our names; what means nothing stays as it is."""
    wanted = dict[str, list[Graft]]()
    for graft in grafts:
        wanted.setdefault(table_of(reading.anatomy, graft.place), []).append(graft)
    given, found = dict[str, dict[str, Tensor]](), {n.key: n.value for n in reading.tensors.named}
    for key, tensor in reading.tensors.strangers.items():
        parts, gate = _NAME.fullmatch(key), _gate_of(reading, wanted, key)
        if gate is not None:
            found[gate] = tensor
        elif parts and parts["name"] == reading.folder.name and parts["location"] in wanted:
            given.setdefault(parts["location"], {})[parts["tensor"]] = tensor
        else:
            found[key] = tensor
    for location, members in wanted.items():
        widths = [len(row) for graft in members for row in _rows(graft)]
        table = _table(reading, location, given.get(location, {}), sum(widths))
        parts = iter(table.split(widths, dim=1))
        for graft in members:
            found |= {f"{graft.place.key}.{name}": next(parts) for name in ("key", "value")}
    return found


def _gate_of(reading: Reading, wanted: Mapping[str, list[Graft]], key: str) -> str | None:
    """Returns our name of a gate's tensor, None if it is none."""
    parts = _GATE.fullmatch(key)
    if not parts or parts["name"] != reading.folder.name or not reading.config["use_gating"]:
        return None
    at = block_at(reading.anatomy, parts["module"])
    span = None if at is None else span_of(*at)
    if at is None or span is None:
        return None
    places = (graft.place for grafts in wanted.values() for graft in grafts)
    inside = (place for place in places if is_in(place.module, (at[0].path,)))
    keys = (p.key for p in inside if isinstance(p, AttentionPlace) and p.kind == span.kind)
    return next((f"{key}.gate.{parts['tensor']}" for key in keys), None)


def _rows(graft: Graft) -> tuple[Tensor, Tensor]:
    """Returns the first key and the first value of a prefix."""
    assert isinstance(graft.delta, PrefixValues)
    return graft.delta.key[0], graft.delta.value[0]


def table_of(anatomy: Anatomy, place: Place) -> str:
    """Returns what AdapterHub calls the attentions that share a table with a place."""
    assert isinstance(place, AttentionPlace)
    if place.kind == "cross-attention":
        return "cross_prefix"
    in_encoder = any(
        is_in(place.module, (block.path,))
        for stack in anatomy.stacks
        if _is_encoder(anatomy, stack)
        for block in stack.blocks
    )
    return "encoder_prefix" if in_encoder else "self_prefix"


def _table(reading: Reading, location: str, own: Mapping[str, Tensor], width: int) -> Tensor:
    """Returns T of a location, `(P, width)`.

    Raises:
        FormatError: tensors are missing or unexpected.
        BaseMismatchError: the model has other sizes, or another number of layers.
    """
    length, inner = reading.config["prefix_length"], reading.config["bottleneck_size"]
    if reading.config["flat"]:
        _check(reading, location, own, {FLAT: (length * width,)})
        return own[FLAT].view(length, width)
    features = max(block.width for block in reading.anatomy.blocks)
    shapes = {
        "wte.weight": (length, features),
        f"{_W1}.weight": (inner, features),
        f"{_W1}.bias": (inner,),
        f"{_W2}.weight": (width, inner),
        f"{_W2}.bias": (width,),
    }
    _check(reading, location, own, shapes)
    E, W1, c1, W2, c2 = (own[name].float() for name in shapes)
    act = ACTIVATIONS[activation(reading)]
    return F.linear(act(F.linear(E, W1, c1)), W2, c2)


def _check(
    reading: Reading, location: str, own: Mapping[str, Tensor], shapes: Mapping[str, Any]
) -> None:
    problems = [
        f"{len(names)} {what} for {location}: {listed(sorted(names))}"
        for what, names in (("missing", shapes.keys() - own), ("unexpected", own.keys() - shapes))
        if names
    ]
    if problems:
        raise FormatError(
            f"{reading.where}: its tensors don't fit its settings: {'; '.join(problems)}."
        )
    for name, shape in shapes.items():
        if tuple(own[name].shape) != shape:
            raise BaseMismatchError(
                f'{reading.where} was made for another base: "{location}.{name}" is '
                f"{tuple(own[name].shape)}, this model and its settings need {shape}."
            )


KIND = Prefix()
