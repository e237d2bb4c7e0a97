"""Prefixes of ours in AdapterHub's flat form; `prefix` says what that computes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graftune.errors import FormatError
from graftune.formats.adapterhub import paths
from graftune.formats.adapterhub.low_rank import GATE
from graftune.formats.adapterhub.low_rank_writing import check_gate
from graftune.formats.adapterhub.prefix import FLAT, table_of
from graftune.methods._prefix import PrefixFromMlp, PrefixValues
from graftune.methods.prefix import PrefixTuning
from graftune.sites.base import AttentionPlace, Graft

if TYPE_CHECKING:
    from graftune.adapter import Adapter

_UNUSED: dict[str, Any] = {
    "architecture": "prefix_tuning",
    "bottleneck_size": 512,
    "encoder_prefix": True,
    "flat": True,
    "init_weights_seed": None,
    "non_linearity": "tanh",
}


def content(adapter: Adapter) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """Returns settings and tensors; None if it has no prefixes.

    Raises:
        FormatError: AdapterHub can't compute it; the message says why.
    """
    method = adapter.method
    if not isinstance(method, PrefixTuning):
        return None
    _check(adapter, method)
    tables, places = dict[str, list[Tensor]](), list[str]()
    for graft in adapter.grafts:
        if isinstance(graft.place, AttentionPlace):
            home = table_of(adapter.anatomy, graft.place)
            tables.setdefault(home, []).extend(_values(adapter, graft))
            places.append(graft.place.module)
    settings = {
        **_UNUSED,
        "cross_prefix": "cross-attention" in method.sublayers,
        "dropout": method.dropout,
        "leave_out": paths.left_out(adapter.anatomy, places),
        "prefix_length": method.length,
        "shared_gating": method.shared_gate,
        "use_gating": method.gate is not None,
    }
    home = f"{paths.body(adapter.model)}prefix_tuning.prefix_tunings.{adapter.name}"
    return settings, {
        f"{home}.{location}.{FLAT}": torch.cat(parts, 1).flatten()
        for location, parts in tables.items()
    } | _gates(adapter)


def _gates(adapter: Adapter) -> dict[str, Tensor]:
    """Returns the gates' tensors, by AdapterHub's names."""
    return {
        f"{paths.attention_home(adapter.anatomy, graft.place.module)}.prefix_tuning.prefix_gates."
        f"{adapter.name}.{name.removeprefix('gate.')}": tensor
        for graft in adapter.grafts
        if isinstance(graft.place, AttentionPlace)
        for name, tensor in graft.delta.state_dict().items()
        if name in GATE
    }


def _check(adapter: Adapter, method: PrefixTuning) -> None:
    """Raises FormatError if AdapterHub has no such prefixes."""
    check_gate(method.gate)
    kind = adapter.anatomy.model_type
    if kind in paths.LIKE_T5 and not method.shift_keys:
        raise FormatError(
            f"AdapterHub shifts the relative positions of a {kind}'s real tokens by the prefix's "
            "length, and this one doesn't (shift_keys=True)."
        )
    if method.position == "infix":
        raise FormatError("AdapterHub's prefixes are seen by all tokens, and this one is an infix.")
    if method.shift_positions:
        raise FormatError("AdapterHub's prefixes take no positions (shift_positions=False).")
    if "attention" not in method.sublayers:
        raise FormatError("AdapterHub has no prefix of cross-attention alone.")


def _values(adapter: Adapter, graft: Graft) -> tuple[Tensor, Tensor]:
    """Returns keys and values, each `(m, kv)`.

    Raises:
        FormatError: AdapterHub takes their heads to be of another size.
    """
    delta = graft.delta.values() if isinstance(graft.delta, PrefixFromMlp) else graft.delta
    assert isinstance(delta, PrefixValues)
    config: Any = adapter.model.config
    heads = config.num_attention_heads
    size = config.hidden_size // heads
    width = size * (getattr(config, "num_key_value_heads", None) or heads)
    if delta.key.shape[1] != width:
        raise FormatError(
            f"its heads aren't of {size} features, which is hidden_size by num_attention_heads and "
            "what AdapterHub takes them for."
        )
    return delta.key.detach(), delta.value.detach()
