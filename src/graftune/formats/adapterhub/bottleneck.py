"""Bottleneck adapters, by AdapterHub's flags.

x is what a sublayer's answer h is added to, N the norm of post-norm blocks:

    original_ln_before   reads z = N(h + x), pre-norm h + x; without it, z = h
    residual_before_ln   adds A(z) to h, False to z, "post_add" to h + x: that is o
    original_ln_after    goes on with N(o + x), pre-norm o + x; without it, with o itself
    is_parallel          reads x, adds to h

A file of which the flags lose x (o without it) is read as if they didn't, and warned of.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from graftune.errors import FormatError, nearest
from graftune.formats.adapterhub import invertible
from graftune.formats.adapterhub.base import Kind, Reading
from graftune.formats.adapterhub.names import span_of
from graftune.formats.filling import fill
from graftune.methods._bottleneck import BottleneckMethod
from graftune.methods.base import Method
from graftune.methods.houlsby import HoulsbyAdapter
from graftune.methods.parallel import ParallelAdapter
from graftune.methods.pfeiffer import PfeifferAdapter
from graftune.sites.base import Graft, SublayerPlace

ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "swish": "silu",
    "silu": "silu",
    "tanh": "tanh",
    "sigmoid": "sigmoid",
    "leakyrelu": "leaky_relu",
    "leaky_relu": "leaky_relu",
    "linear": "identity",
}
"""AdapterHub's names of activations, and ours."""
OLD_ACTIVATIONS = {"gelu": "gelu_new", "gelu_orig": "gelu"}
"""What files without a version mean by names that were given anew."""
INITS = {"bert": "bert", "mam_adapter": "zero-up", "houlsby": "near-identity"}
"""AdapterHub's names of initial values, and ours."""
TENSORS = {
    "adapter_down.0.weight": "down",
    "adapter_down.0.bias": "down_bias",
    "adapter_up.weight": "up",
    "adapter_up.bias": "up_bias",
    "scaling": "scale",
    "gate.weight": "gate.weight",
    "gate.bias": "gate.bias",
    "adapter_norm_after.weight": "after_weight",
    "adapter_norm_after.bias": "after_bias",
}
"""AdapterHub's names of tensors, and ours."""
NORMED_TENSORS = TENSORS | {
    "adapter_down.1.weight": "down",
    "adapter_down.1.bias": "down_bias",
    "adapter_down.0.weight": "before_weight",
    "adapter_down.0.bias": "before_bias",
    "adapter_norm_before.weight": "before_weight",
    "adapter_norm_before.bias": "before_bias",
}
"""The same where a norm comes first, which is saved under two names."""


class Bottleneck(Kind):
    """See the module."""

    name = "bottleneck"
    defaults = {  # noqa: RUF012
        "adapter_residual_before_ln": False,
        "cross_adapter": False,
        "dropout": 0.0,
        "init_weights": "bert",
        "is_parallel": False,
        "ln_after": False,
        "ln_before": False,
        "mh_adapter": None,
        "non_linearity": None,
        "original_ln_after": True,
        "original_ln_before": False,
        "output_adapter": None,
        "reduction_factor": None,
        "residual_before_ln": True,
        "scaling": 1.0,
        "stochastic_depth": 0.0,
        "use_gating": False,
        "inv_adapter": None,
        "inv_adapter_reduction_factor": None,
        "invertible_adapter": None,
    }
    without_effect = (
        "init_weights_seed",
        *("factorized_phm_W", "factorized_phm_rule", "hypercomplex_nonlinearity", "learn_phm"),
        *("phm_bias", "phm_c_init", "phm_dim", "phm_init_range", "phm_layer", "phm_rank"),
        *("shared_W_phm", "shared_phm_rule", "attention_type", "new_attention_norm"),
    )

    def reads(self, settings: Mapping[str, Any]) -> bool:
        """See `Kind.reads`: with fusions the only ones that say nothing of their kind."""
        said = settings.get("architecture") or settings.get("phm_layer")
        return not said and "query" not in settings

    def checked(self, settings: Mapping[str, Any], where: str, wrote: str) -> dict[str, Any]:
        """See `Kind.checked`."""
        config = super().checked(settings, where, wrote)
        for key in ("mh_adapter", "output_adapter", "non_linearity", "reduction_factor"):
            if config[key] is None:
                raise FormatError(f'{where}: its settings have no "{key}".')
        return config

    def planned(self, reading: Reading, heads: Sequence[str]) -> tuple[Method, list[Graft]]:
        """See `Kind.planned`."""
        invertible.is_there(reading)
        method = self.method_of(reading, heads)
        grafts = method.plan(reading.model, reading.anatomy, empty=True)
        fill(grafts, self._named(reading, grafts), reading.where, reading.folder)
        return method, grafts

    def method_of(self, reading: Reading, heads: Sequence[str]) -> BottleneckMethod:
        """Returns AdapterHub's settings as ours.

        Raises:
            FormatError: they are of no adapter that there is.
        """
        config, common = reading.config, common_settings(reading, heads)
        if config["is_parallel"]:
            if not config["original_ln_after"]:
                _warn_lost(reading)
            return ParallelAdapter(reads="residual", **common)
        kind = HoulsbyAdapter if config["mh_adapter"] else PfeifferAdapter
        return kind(**common, **serial_settings(reading))

    def tensors(self, config: Mapping[str, Any]) -> Mapping[str, str]:
        """Returns AdapterHub's names of a place's tensors, and ours."""
        return NORMED_TENSORS if config["ln_before"] else TENSORS

    def shared(self, reading: Reading) -> dict[str, Tensor]:
        """Returns the tensors that all places share, under our names."""
        return dict(reading.tensors.shared)

    def _named(self, reading: Reading, grafts: Sequence[Graft]) -> dict[str, Tensor]:
        """Returns a file's tensors under our names; one that means nothing stays as it is."""
        keys = {g.place.name: g.place.key for g in grafts if isinstance(g.place, SublayerPlace)}
        ours, found = self.tensors(reading.config), dict[str, Tensor]()
        for named in reading.tensors.named:
            span = span_of(named.block, named.rest)
            place = keys.get(f"{named.block.path}.{span.kind}") if span is not None else None
            own = ours.get(named.tensor)
            found[named.key if place is None or own is None else f"{place}.{own}"] = named.value
        strangers = {invertible.ours(key): t for key, t in reading.tensors.strangers.items()}
        return {**found, **strangers, **self.shared(reading)}


def common_settings(reading: Reading, heads: Sequence[str]) -> dict[str, Any]:
    """Returns our settings of any bottleneck."""
    config = reading.config
    return {
        "sublayers": _sublayers(reading),
        "reduction": _reduction(config["reduction_factor"], reading),
        "bottleneck": None,
        "activation": activation(reading),
        "scale": config["scaling"],
        "dropout": config["dropout"],
        "init": INITS.get(config["init_weights"], "bert"),
        "gate": "mean-padded" if config["use_gating"] else None,
        "norm_before": config["ln_before"],
        "norm_after": config["ln_after"],
        "layers": reading.layers,
        "train_head": tuple(heads) or False,
        "train_norms": False,
    }


def serial_settings(reading: Reading) -> dict[str, Any]:
    """Returns our settings that serial bottlenecks have besides."""
    config = reading.config
    placement, skips = _placement(reading)
    return {
        "placement": placement,
        "skips": skips,
        "norm_adds_skip": config["ln_after"] and config["adapter_residual_before_ln"],
        "stochastic_depth": config["stochastic_depth"],
        **invertible.settings(reading),
    }


def _placement(reading: Reading) -> tuple[str, str]:
    """Returns the `placement` and `skips` that a serial adapter's flags mean."""
    config, is_post = reading.config, _is_post(reading)
    residual, goes_last = config["residual_before_ln"], not config["original_ln_after"]
    if residual == "post_add" and not (is_post and config["original_ln_before"]):
        raise FormatError(
            f'{reading.where} has residual_before_ln="post_add", with which AdapterHub itself '
            "computes nothing here: it is for original_ln_before in post-norm models."
        )
    if not config["original_ln_before"]:
        if goes_last:
            _warn_lost(reading)
        return "simple", "answer"
    if goes_last:
        if residual:
            _warn_lost(reading)
        return "result", "answer"
    return "adapterhub", {True: "answer", False: "read", "post_add": "sum"}[residual]


def _is_post(reading: Reading) -> bool:
    orders = {block.order for block in reading.anatomy.blocks}
    if orders & {"sandwich"}:
        raise FormatError(
            f"{reading.where}: AdapterHub reads another block's norm in models that norm a "
            f"sublayer's answer as well, such as this {reading.anatomy.model_type}, so that its "
            "bottlenecks can't be read onto one."
        )
    return orders == {"post"}


def _warn_lost(reading: Reading) -> None:
    warnings.warn(
        f"{reading.where} has original_ln_after=False in a combination in which AdapterHub loses "
        "what the sublayer's answer is added to; it is added here, so that outputs differ from "
        "AdapterHub's.",
        stacklevel=2,
    )


def _sublayers(reading: Reading) -> tuple[str, ...]:
    config, kinds = reading.config, set[str]()
    for named in reading.tensors.named:
        span = span_of(named.block, named.rest)
        kinds.add("" if span is None else span.kind)
    crosses = config["cross_adapter"] or "cross-attention" in kinds
    wanted = {
        "attention": config["mh_adapter"],
        "cross-attention": crosses,
        "ffn": config["output_adapter"],
    }
    return tuple(kind for kind, on in wanted.items() if on)


def _reduction(given: Any, reading: Reading) -> float | dict[str, float]:
    """Returns d over k, at most d: AdapterHub's bottlenecks are at least 1 wide."""
    width = max(block.width for block in reading.anatomy.blocks)
    if isinstance(given, Mapping):
        return {str(block): min(by, width) for block, by in given.items()}
    return min(given, width)


def activation(reading: Reading) -> str:
    """Returns our name of the activation that the settings name.

    Raises:
        FormatError: there is none of that name.
    """
    given = str(reading.config["non_linearity"]).lower()
    if not reading.folder.config.get("version"):
        given = OLD_ACTIVATIONS.get(given, given)
    if given not in ACTIVATIONS:
        raise FormatError(
            f'{reading.where}: its activation "{given}" is unknown here, expected one of '
            f"{', '.join(ACTIVATIONS)}.{nearest(given, ACTIVATIONS)}"
        )
    return ACTIVATIONS[given]


KIND = Bottleneck()
