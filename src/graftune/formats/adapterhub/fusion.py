"""Fusions: attention over adapters that are attached already, by their names in the file.

With `temperature` AdapterHub starts each run at 50 and falls to 1 over 980 passes without saving
where it is; what was trained for is the end of that, 1.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from graftune.errors import FormatError
from graftune.formats.adapterhub.base import Kind, Reading
from graftune.formats.adapterhub.folder import Folder
from graftune.formats.adapterhub.names import span_of
from graftune.formats.filling import fill
from graftune.methods.base import Method
from graftune.methods.fusion import AdapterFusion, FusionDelta
from graftune.sites.base import Graft, SublayerPlace

_TENSORS = {
    "query.weight": "query",
    "query.bias": "query_bias",
    "key.weight": "key",
    "key.bias": "key_bias",
    "value.weight": "value",
}
_PENALTY = 0.01


class Fusion(Kind):
    """See the module."""

    name = "fusion"
    in_every_block = False
    defaults = {  # noqa: RUF012
        "dropout_prob": None,
        "key": True,
        "query": True,
        "query_before_ln": False,
        "regularization": True,
        "residual_before": False,
        "temperature": False,
        "value": True,
    }
    without_effect = ("value_before_softmax", "value_initialized")  # V is linear

    def reads(self, settings: Mapping[str, Any]) -> bool:
        """See `Kind.reads`."""
        return "query" in settings

    def planned(self, reading: Reading, heads: Sequence[str]) -> tuple[Method, list[Graft]]:
        """See `Kind.planned`."""
        config = reading.config
        if not (config["query"] and config["key"]):
            raise FormatError(
                f"{reading.where} is a fusion without query or key, which attends to nothing."
            )
        if config["temperature"]:
            warnings.warn(
                f"{reading.where} has temperature=True, whose present value AdapterHub does not "
                "save; it is read as 1, where it ends.",
                stacklevel=2,
            )
        method = AdapterFusion(
            members=members(reading.folder),
            value=config["value"],
            value_penalty=_PENALTY if config["regularization"] else 0.0,
            query_from="answer" if config["query_before_ln"] else "read",
            adds_before=config["residual_before"],
            dropout=_dropout(reading),
            train_head=False,
        )
        grafts = method.plan(reading.model, reading.anatomy, empty=True)
        fill(grafts, _named(reading, grafts), reading.where, reading.folder)
        return method, grafts


def members(folder: Folder) -> tuple[str, ...]:
    """Returns the names of the adapters that a fusion joins."""
    return tuple(folder.config.get("adapter_names") or folder.name.split(","))


def _dropout(reading: Reading) -> float:
    of_model = getattr(reading.model.config, "attention_probs_dropout_prob", None)
    return float(reading.config["dropout_prob"] or of_model or 0.0)


def _named(reading: Reading, grafts: Sequence[Graft]) -> dict[str, Tensor]:
    """Returns a file's tensors under our names; one that means nothing stays as it is."""
    keys = {g.place.name: g.place.key for g in grafts if isinstance(g.place, SublayerPlace)}
    known = {key for graft in grafts for key, _ in graft.tensors()}
    found: dict[str, Tensor] = {}
    for graft in grafts:  # what is never in their files: nothing is pruned, nothing was measured
        assert isinstance(graft.delta, FusionDelta)
        found[f"{graft.place.key}.kept"] = torch.ones_like(graft.delta.kept)
        found[f"{graft.place.key}.attention"] = torch.zeros_like(graft.delta.attention)
    for named in reading.tensors.named:
        span = span_of(named.block, named.rest)
        place = keys.get(f"{named.block.path}.{span.kind}") if span is not None else None
        own = f"{place}.{_TENSORS.get(named.tensor)}"
        own = own if own in known else own.removesuffix(".value")  # a graft's value has no name
        found[own if own in known else named.key] = named.value
    return {**found, **reading.tensors.strangers, **reading.tensors.shared}


KIND = Fusion()
