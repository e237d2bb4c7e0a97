"""Our bottlenecks by AdapterHub's flags; `bottleneck` says what these mean."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor

from graftune.errors import FormatError
from graftune.formats.adapterhub import bottleneck, compacter, invertible, paths
from graftune.formats.adapterhub.bottleneck import ACTIVATIONS, INITS
from graftune.formats.adapterhub.low_rank_writing import check_gate
from graftune.methods._bottleneck import BottleneckDelta, BottleneckMethod, SerialMethod
from graftune.methods.compacter import Compacter
from graftune.methods.parallel import ParallelAdapter
from graftune.sites.base import SublayerPlace

if TYPE_CHECKING:
    from graftune.adapter import Adapter

_UNUSED: dict[str, Any] = {
    "cross_adapter": False,
    "factorized_phm_W": True,
    "factorized_phm_rule": False,
    "hypercomplex_nonlinearity": "glorot-uniform",
    "init_weights_seed": None,
    "inv_adapter": None,
    "inv_adapter_reduction_factor": None,
    "learn_phm": True,
    "phm_bias": True,
    "phm_c_init": "normal",
    "phm_dim": 4,
    "phm_init_range": 0.0001,
    "phm_layer": False,
    "phm_rank": 1,
    "shared_W_phm": False,
    "shared_phm_rule": True,
}
"""Settings of what these adapters have not, as AdapterHub writes them."""


def content(adapter: Adapter) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """Returns settings and tensors; None if it has no bottlenecks.

    Raises:
        FormatError: AdapterHub can't compute it; the message says why.
    """
    method = adapter.method
    if not isinstance(method, BottleneckMethod):
        return None
    config, tensors = settings(adapter, method), _tensors(adapter, method)
    if not isinstance(method, SerialMethod):
        return config, tensors
    more, coupling = invertible.written(adapter, method)
    return config | more, tensors | coupling


def settings(adapter: Adapter, method: BottleneckMethod) -> dict[str, Any]:
    """Returns AdapterHub's settings of a bottleneck adapter."""
    check_gate(method.gate)
    kinds = method.sublayers
    is_t5 = adapter.anatomy.model_type in paths.LIKE_T5
    crosses = "cross-attention" in kinds
    if crosses and not is_t5 and "attention" not in kinds:
        raise FormatError("AdapterHub has no bottleneck after cross-attention alone.")
    names = [place.name for place, _ in _bottlenecks(adapter)]
    return {
        **_UNUSED,
        "cross_adapter": crosses and is_t5,
        "dropout": method.dropout,
        "init_weights": {o: t for t, o in INITS.items()}.get(method.init, "bert"),
        "leave_out": paths.left_out(adapter.anatomy, names),
        "ln_after": method.norm_after,
        "ln_before": method.norm_before,
        "mh_adapter": "attention" in kinds,
        "non_linearity": activation_name(method.activation),
        "output_adapter": "ffn" in kinds,
        "reduction_factor": _reduction(adapter, method),
        "scaling": method.scale if isinstance(method.scale, str) else float(method.scale),
        "stochastic_depth": method.stochastic_depth,
        "use_gating": method.gate is not None,
        **_flags(adapter, method),
        **_phm(method),
    }


def _phm(method: BottleneckMethod) -> dict[str, Any]:
    """Returns the settings that a Compacter has besides."""
    if not isinstance(method, Compacter):
        return {}
    return {"phm_layer": True, **{name: getattr(method, name) for name in compacter.SETTINGS}}


def _flags(adapter: Adapter, method: BottleneckMethod) -> dict[str, Any]:
    """Returns the flags that say what is read and what is added to."""
    is_post = {block.order for block in adapter.anatomy.blocks} == {"post"}
    found: dict[str, Any] = {
        "adapter_residual_before_ln": method.norm_adds_skip,
        "is_parallel": False,
        "original_ln_after": True,
        "original_ln_before": True,
        "residual_before_ln": True,
    }
    if isinstance(method, ParallelAdapter):
        if not is_post and method.reads != "residual":
            raise FormatError(
                "it reads what the sublayer sees, and AdapterHub's parallel adapters read what is "
                'before the norm: reads="residual".'
            )
        if method.norm_adds_skip or method.stochastic_depth:
            raise FormatError(
                "AdapterHub's parallel adapters have neither norm_adds_skip nor stochastic_depth."
            )
        return found | {"is_parallel": True, "original_ln_before": False}
    assert isinstance(method, SerialMethod)
    if method.placement == "simple":
        return found | {"original_ln_before": False}
    if method.placement == "result":
        return found | {"original_ln_after": False, "residual_before_ln": False}
    skips: dict[str, Any] = {"answer": True, "read": False, "sum": "post_add" if is_post else False}
    return found | {"residual_before_ln": skips[method.skips]}


def activation_name(ours: str) -> str:
    """Returns AdapterHub's name of an activation.

    Raises:
        FormatError: it has none.
    """
    names = {"gelu_tanh": "gelu_new", "silu": "swish", "leaky_relu": "leakyrelu"}
    name = names.get(ours, next((t for t, o in ACTIVATIONS.items() if o == ours), None))
    if name is None:
        raise FormatError(f"AdapterHub has no activation {ours}.")
    return name


def _reduction(adapter: Adapter, method: BottleneckMethod) -> Any:
    """Returns d over k, for which AdapterHub finds the same k."""
    if method.bottleneck is None:
        return method.reduction
    width = max(block.width for block in adapter.anatomy.blocks)
    by = width / method.bottleneck
    by = int(by) if by == int(by) else by
    if int(width // by) != method.bottleneck:
        by = width / (method.bottleneck + 0.5)
    return by


def _tensors(adapter: Adapter, method: BottleneckMethod) -> dict[str, Tensor]:
    names = _names(method)
    blocks = {block.path: block for block in adapter.anatomy.blocks}
    found: dict[str, Tensor] = {}
    for place, delta in _bottlenecks(adapter):
        path, _, kind = place.name.rpartition(".")
        home = paths.bottleneck_home(adapter.anatomy, blocks[path], kind)
        if home is None:
            raise FormatError(f"AdapterHub has no bottleneck after the {kind} of this model.")
        for name, tensor in delta.state_dict().items():
            if name.startswith("common."):
                key = f"{_shared_home(adapter)}{_shared_name(name.removeprefix('common.'))}"
                found[key] = tensor.detach()
                continue
            for theirs in names[name]:
                found[f"{home}.adapters.{adapter.name}.{theirs}"] = tensor.detach()
    return found


def _names(method: BottleneckMethod) -> dict[str, list[str]]:
    """Returns what AdapterHub calls each tensor: a norm that comes first by two names."""
    kind = compacter.KIND if isinstance(method, Compacter) else bottleneck.KIND
    found: dict[str, list[str]] = {}
    for theirs, ours in kind.tensors({"ln_before": method.norm_before}).items():
        at = theirs.startswith("adapter_down.0.")
        if not (method.norm_before and at and ours.startswith("down")):
            found.setdefault(ours, []).append(theirs)
    return found


def _shared_home(adapter: Adapter) -> str:
    model: Any = adapter.model
    if adapter.anatomy.model_type in paths.LIKE_T5:
        raise FormatError("AdapterHub can't load what maps share in T5; give each a rule.")
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    return f"{prefix}shared_parameters.{adapter.name}."


def _shared_name(ours: str) -> str:
    return ours if ours.startswith("phm_rule") else f"W_{ours}"


def _bottlenecks(adapter: Adapter) -> Iterator[tuple[SublayerPlace, BottleneckDelta]]:
    for graft in adapter.grafts:
        if isinstance(graft.place, SublayerPlace) and isinstance(graft.delta, BottleneckDelta):
            yield graft.place, graft.delta
