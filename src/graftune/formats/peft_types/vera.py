"""VERA: HF PEFT's VeRA, for linears and Conv1D; its A and B lie outside the model's modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from graftune.formats.peft_factors import FactorsType, own_grafts
from graftune.methods.base import Method
from graftune.methods.vera import VeRA
from graftune.sites import hosts
from graftune.sites.base import Graft

if TYPE_CHECKING:
    from graftune.adapter import Adapter

_SHARED = ("vera_A", "vera_B")
_PREFIX = "base_model."


class _VeRA(FactorsType):
    """See the module."""

    name = "VERA"
    method = "VeRA"
    names = {"b": "vera_lambda_b", "d": "vera_lambda_d"}  # noqa: RUF012
    kinds = ("linear", "Conv1D")
    defaults = {  # noqa: RUF012
        "d_initial": 0.1,
        "projection_prng_key": 0,
        "r": 256,
        "save_projection": True,
        "vera_dropout": 0.0,
    }
    without_effect = ("fan_in_fan_out", "init_weights")
    neutral = {"bias": ("none",)}  # noqa: RUF012

    def settings(self, adapter: Adapter) -> dict[str, Any]:
        """See `PeftType.settings`."""
        method, model = adapter.method, adapter.model
        assert isinstance(method, VeRA)
        modules = [model.get_submodule(module) for module in self.modules(adapter.grafts)]
        return {
            "bias": "none",
            "d_initial": method.d_initial,
            "fan_in_fan_out": any(hosts.is_transposed(module) for module in modules),
            "projection_prng_key": method.projection_seed,
            "r": method.r,
            "save_projection": method.save_projection,
            "vera_dropout": method.dropout,
        }

    def method_of(
        self, config: Mapping[str, Any], modules: Sequence[str], heads: Sequence[str]
    ) -> Method:
        """See `PeftType.method_of`."""
        return VeRA(
            r=config["r"],
            d_initial=config["d_initial"],
            dropout=config["vera_dropout"],
            targets=tuple(modules),
            projection_seed=config["projection_prng_key"],
            save_projection=config["save_projection"],
            train_head=tuple(heads) or False,
        )

    def key(self, name: str) -> str:
        """See `PeftType.key`."""
        return _PREFIX + name if name in _SHARED else super().key(name)

    def file_tensors(self, model: nn.Module, grafts: Sequence[Graft]) -> dict[str, Tensor]:
        """See `PeftType.file_tensors`."""
        shared = {n: t for graft in own_grafts(grafts) for n, t in graft.tensors() if n in _SHARED}
        return super().file_tensors(model, grafts) | shared

    def own_tensors(
        self, model: nn.Module, grafts: Sequence[Graft], tensors: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """See `PeftType.own_tensors`; A and B are left out where the settings draw them."""
        stored = {name for graft in own_grafts(grafts) for name, _ in graft.tensors()}
        found = super().own_tensors(model, grafts, tensors)
        for name in _SHARED:
            tensor = found.pop(_PREFIX + name, None)
            tensor = found.pop(name, None) if tensor is None else tensor
            if tensor is not None and name in stored:
                found[name] = tensor
        return found


TYPE = _VeRA()
