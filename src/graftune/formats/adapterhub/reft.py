"""Interventions on blocks' answers by AdapterHub: LoReFT, NoReFT and what is left of DiReFT.

    units.0, units.1    of the first and of the last tokens; tied, units.0 of both
    learned_source      W, b
    projection          R; with orthogonality what torch's parametrisation makes it of, original
                        (r, d) and base (d, d):
        r < d           R = (base H D)^T     H (d, r) of the reflections below original's diagonal D
        r = d           R = base exp(X - X^T)           X the lower triangle of original

The base is not kept: R is, from which training goes on. AdapterHub doesn't write the setting
`subtract_projection`, by which a DiReFT differs from a NoReFT, and reads DiReFTs as NoReFTs. They
are read so here, with a warning, unless that word is put into the settings.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from graftune.anatomy import Anatomy
from graftune.errors import FormatError
from graftune.formats.adapterhub.base import Kind, Reading
from graftune.formats.adapterhub.bottleneck import activation
from graftune.formats.filling import fill
from graftune.methods.base import Method
from graftune.methods.reft import DiReFT, LoReFT, NoReFT, ReftMethod
from graftune.sites.base import Graft

ORIGINAL = "projection.parametrizations.weight.original"
BASE = "projection.parametrizations.weight.0.base"
TENSORS = {
    "learned_source.weight": "W",
    "learned_source.bias": "b",
    "projection.weight": "basis",
}
"""AdapterHub's names of an intervention's tensors, and ours."""
_NEEDED = ("layers", "orthogonality", "prefix_positions", "r", "suffix_positions")


class Reft(Kind):
    """See the module."""

    name = "ReFT"
    holder = "refts"
    defaults = {  # noqa: RUF012
        **dict.fromkeys(_NEEDED),
        "dropout": 0.05,
        "non_linearity": None,
        "output_reft": True,
        "subtract_projection": None,
        "tied_weights": False,
    }
    without_effect = ("dtype", "init_weights_seed")

    def reads(self, settings: Mapping[str, Any]) -> bool:
        """See `Kind.reads`."""
        return settings.get("architecture") == "reft"

    def checked(self, settings: Mapping[str, Any], where: str, wrote: str) -> dict[str, Any]:
        """See `Kind.checked`."""
        config = super().checked(settings, where, wrote)
        for key in _NEEDED:
            if config[key] is None:
                raise FormatError(f'{where}: its settings have no "{key}".')
        if not config["output_reft"]:
            raise FormatError(f"{where} has output_reft=False, with which it changes nothing.")
        return config

    def left_out(self, config: Mapping[str, Any], anatomy: Anatomy) -> tuple[int, ...]:
        """See `Kind.left_out`."""
        layers = config["layers"]
        every = [block.index for block in anatomy.blocks]
        return () if layers == "all" else tuple(i for i in every if i not in layers)

    def planned(self, reading: Reading, heads: Sequence[str]) -> tuple[Method, list[Graft]]:
        """See `Kind.planned`."""
        method = self.method_of(reading, heads)
        grafts = method.plan(reading.model, reading.anatomy, empty=True)
        fill(grafts, _named(reading, grafts, method), reading.where, reading.folder)
        return method, grafts

    def method_of(self, reading: Reading, heads: Sequence[str]) -> ReftMethod:
        """Returns AdapterHub's settings as ours."""
        config = reading.config
        out = self.left_out(config, reading.anatomy)
        every = [block.index for block in reading.anatomy.blocks]
        common: dict[str, Any] = {
            "r": config["r"],
            "prefix_positions": config["prefix_positions"],
            "suffix_positions": config["suffix_positions"],
            "tied": config["tied_weights"],
            "activation": "identity" if config["non_linearity"] is None else activation(reading),
            "dropout": config["dropout"],
            "layers": tuple(i for i in every if i not in out) if out else None,
            "train_head": tuple(heads) or False,
        }
        is_orthogonal, subtracts = config["orthogonality"], config["subtract_projection"]
        if subtracts is False:
            return DiReFT(orthogonal=is_orthogonal, **common)
        if subtracts is None and not is_orthogonal:
            warnings.warn(
                f"{reading.where} is a NoReFT or a DiReFT, which AdapterHub writes alike; it is "
                "taken for a NoReFT, as AdapterHub takes it. If it was trained as a DiReFT, write "
                '"subtract_projection": false into its settings.',
                stacklevel=2,
            )
        return LoReFT(**common) if is_orthogonal else NoReFT(**common)


def _named(reading: Reading, grafts: Sequence[Graft], method: ReftMethod) -> dict[str, Tensor]:
    """Returns a file's tensors under our names; one that means nothing stays as it is.

    Of two interventions, one of tokens that there are none of is left out.
    """
    places = {graft.place.module: graft.place.key for graft in grafts}
    names = dict(enumerate(("both",) if method.tied else ("first", "last")))
    units: dict[tuple[str, int], dict[str, tuple[str, Tensor]]] = {}
    found = dict(reading.tensors.strangers)
    for named in reading.tensors.named:
        word, _, rest = named.tensor.partition(".")
        number, _, tensor = rest.partition(".")
        place = places.get(named.block.path) if named.rest == "reft_layer" else None
        if place is None or word != "units" or not number.isdigit() or int(number) not in names:
            found[named.key] = named.value
        else:
            units.setdefault((place, int(number)), {})[tensor] = (named.key, named.value)
    for (place, number), own in units.items():
        if names[number] not in method.units:
            continue
        if method.is_orthonormal and ORIGINAL in own and BASE in own:
            (key, original), (_, base) = own.pop(ORIGINAL), own.pop(BASE)
            R = orthogonal(original.float(), base.float(), f'{reading.where}: "{key}"')
            own["projection.weight"] = (key, R)
        for tensor, (key, value) in own.items():
            ours = TENSORS.get(tensor)
            found[key if ours is None else f"{place}.{names[number]}.{ours}"] = value
    return found


def orthogonal(original: Tensor, base: Tensor, what: str) -> Tensor:
    """Returns R, `(r, d)`, of what torch's parametrisation keeps of it.

    Args:
        original: `(r, d)`.
        base: `(d, d)`.
        what: the tensor, for messages.

    Raises:
        FormatError: the sizes don't fit, or the rows of R aren't orthonormal.
    """
    if original.ndim != 2 or base.shape != 2 * original.shape[1:]:
        raise FormatError(
            f"{what} is {tuple(original.shape)} and its base {tuple(base.shape)}, expected (r, d) "
            "and (d, d)."
        )
    if len(original) == len(base):
        R = base @ torch.matrix_exp(original.tril() - original.tril().mT)
    else:
        below = original.mT.tril(-1)
        turned = torch.linalg.householder_product(below, 2 / (1 + below.square().sum(0)))
        signs = original.diagonal().int()  # as torch: signs that training must leave alone
        R = (base @ (turned * signs)).mT
    if not torch.allclose(R @ R.mT, torch.eye(len(R)), atol=1e-3):
        raise FormatError(
            f"{what} makes rows that aren't orthonormal, as torch's parametrisation does after "
            "training with weight decay, which it doesn't allow."
        )
    return R


KIND = Reft()
