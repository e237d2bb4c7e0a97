"""Compacters: AdapterHub's bottlenecks with phm_layer, of which our names are nearly theirs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from graftune.errors import FormatError
from graftune.formats.adapterhub.base import Reading
from graftune.formats.adapterhub.bottleneck import (
    NORMED_TENSORS,
    TENSORS,
    Bottleneck,
    common_settings,
    serial_settings,
)
from graftune.methods._bottleneck import BottleneckMethod
from graftune.methods.compacter import Compacter, CompacterPlusPlus

SETTINGS = (
    *("factorized_phm_W", "factorized_phm_rule", "learn_phm", "phm_dim", "phm_rank"),
    *("shared_W_phm", "shared_phm_rule"),
)
"""Settings that have the same name here."""


class Phm(Bottleneck):
    """See the module."""

    name = "Compacter"
    defaults = {  # noqa: RUF012
        **Bottleneck.defaults,
        "factorized_phm_W": True,
        "factorized_phm_rule": False,
        "learn_phm": True,
        "phm_bias": True,
        "phm_dim": 4,
        "phm_rank": 1,
        "shared_W_phm": False,
        "shared_phm_rule": True,
    }

    def reads(self, settings: Mapping[str, Any]) -> bool:
        """See `Kind.reads`."""
        return bool(settings.get("phm_layer"))

    def checked(self, settings: Mapping[str, Any], where: str, wrote: str) -> dict[str, Any]:
        """See `Kind.checked`."""
        config = super().checked(settings, where, wrote)
        for key, only in (("phm_bias", True), ("is_parallel", False)):
            if config[key] is not only:
                raise FormatError(
                    f"{where} is a Compacter with {key}={config[key]}, written by {wrote}, which "
                    "is not supported."
                )
        return config

    def method_of(self, reading: Reading, heads: Sequence[str]) -> BottleneckMethod:
        """See `Bottleneck.method_of`."""
        kind = Compacter if reading.config["mh_adapter"] else CompacterPlusPlus
        settings = common_settings(reading, heads) | {"init": "adapterhub"}
        own = {name: reading.config[name] for name in SETTINGS}
        return kind(**settings, **serial_settings(reading), **own)

    def tensors(self, config: Mapping[str, Any]) -> Mapping[str, str]:
        """See `Bottleneck.tensors`."""
        at = 1 if config["ln_before"] else 0
        plain = NORMED_TENSORS if config["ln_before"] else TENSORS
        found = {t: o for t, o in plain.items() if not o.startswith(("down", "up"))}
        for theirs, ours in ((f"adapter_down.{at}", "down"), ("adapter_up", "up")):
            found[f"{theirs}.b"] = f"{ours}_bias"
            found[f"{theirs}.W"] = ours
            for side in ("_left", "_right"):
                found[f"{theirs}.W{side}"] = f"{ours}{side}"
                found[f"{theirs}.phm_rule{side}"] = f"{ours}_rule{side}"
            found[f"{theirs}.phm_rule"] = f"{ours}_rule"
        return found

    def shared(self, reading: Reading) -> dict[str, Tensor]:
        """See `Bottleneck.shared`.

        Raises:
            FormatError: the file lacks what its settings say is shared.
        """
        config, given = reading.config, reading.tensors.shared
        if (config["shared_phm_rule"] or config["shared_W_phm"]) and not given:
            raise FormatError(
                f"{reading.where} lacks the tensors that all maps share, which AdapterHub forgets "
                "to save for some models (T5): nothing can be made of the others."
            )
        return {name.removeprefix("W_"): tensor for name, tensor in given.items()}


KIND = Phm()
