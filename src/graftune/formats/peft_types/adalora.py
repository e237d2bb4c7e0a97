"""ADALORA: HF PEFT's AdaLoRA, for linears, Conv1D and 2-D convolutions, pruned or not.

A pruned file holds the triplets left, rank 0 included; `rank_pattern` says of each module which of
the first `init_r` they were, and the scale stays that of `init_r`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from graftune.errors import SettingsError
from graftune.formats.peft_common import PREFIX
from graftune.formats.peft_factors import FactorsType, own_grafts
from graftune.formats.peft_ranks import whole_number
from graftune.methods.adalora import AdaLoRA
from graftune.methods.base import Method
from graftune.sites import hosts
from graftune.sites.base import Delta

if TYPE_CHECKING:
    from graftune.adapter import Adapter

_LAMBDA = ".lora_E"


class _AdaLoRA(FactorsType):
    """See the module."""

    name = "ADALORA"
    method = "AdaLoRA"
    names: ClassVar[Mapping[str, str]] = {"P": "lora_B", "Lambda": "lora_E", "Q": "lora_A"}
    kinds = ("linear", "Conv1D", "conv")
    defaults: ClassVar[Mapping[str, Any]] = {
        "beta1": 0.85,
        "beta2": 0.85,
        "deltaT": 1,
        "init_r": 12,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "orth_reg_weight": 0.5,
        "rank_pattern": None,
        "target_r": 8,
        "tfinal": 0,
        "tinit": 0,
    }
    without_effect = (
        *("alpha_pattern", "fan_in_fan_out", "init_lora_weights", "r", "total_step", "use_rslora"),
        *("corda_config", "eva_config", "loftq_config", "lora_ga_config", "megatron_core"),
        *("qalora_group_size", "runtime_config"),
    )
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "bias": ("none",),
        "layer_replication": (),
        "lora_bias": (),
        "target_parameters": (),
        "trainable_token_indices": (),
        "use_dora": (),
    }

    def obstacle(self, adapter: Adapter) -> str | None:
        """See `PeftType.obstacle`."""
        assert isinstance(adapter.method, AdaLoRA)
        if adapter.method.alpha == 0:
            return "HF PEFT's AdaLoRA takes an alpha of 0 as init_r"
        for graft in own_grafts(adapter.grafts):
            if isinstance(adapter.model.get_submodule(graft.place.module), nn.Conv1d):
                return "HF PEFT's AdaLoRA acts on convolutions of two dimensions only"
        return super().obstacle(adapter)

    def settings(self, adapter: Adapter) -> dict[str, Any]:
        """See `PeftType.settings`: what is open in the schedule is as the last run had it."""
        method = adapter.method
        assert isinstance(method, AdaLoRA)
        total = adapter.total_steps or (method.tinit or 0) + (method.tfinal or 0) + 1
        try:
            schedule = method.schedule(total)
        except SettingsError:  # told another run's steps after it was pruned
            total = (method.tinit or 0) + (method.tfinal or 0) + 1
            schedule = method.schedule(total)
        modules = self.modules(adapter.grafts)
        hosts_ = [adapter.model.get_submodule(module) for module in modules]
        return {
            "beta1": method.beta1,
            "beta2": method.beta2,
            "bias": "none",
            "deltaT": schedule.delta_t,
            "fan_in_fan_out": any(hosts.is_transposed(host) for host in hosts_),
            "init_lora_weights": True,
            "init_r": method.r,
            "lora_alpha": _alpha(method),
            "lora_dropout": method.dropout,
            "orth_reg_weight": method.orthogonal,
            "rank_pattern": _as_flags(method),
            "target_r": method.target_r,
            "tfinal": schedule.tfinal,
            "tinit": schedule.tinit,
            "total_step": total,
        }

    def method_of(
        self, config: Mapping[str, Any], modules: Sequence[str], heads: Sequence[str]
    ) -> Method:
        """See `PeftType.method_of`: ranks not said are the first, as before any pruning."""
        pattern = config["rank_pattern"]
        return AdaLoRA(
            r=config["init_r"],
            target_r=min(config["target_r"], config["init_r"]),
            alpha=config["lora_alpha"] if config["lora_alpha"] > 0 else None,
            dropout=config["lora_dropout"],
            targets=tuple(modules),
            tinit=config["tinit"],
            tfinal=config["tfinal"],
            delta_t=config["deltaT"],
            beta1=config["beta1"],
            beta2=config["beta2"],
            orthogonal=config["orth_reg_weight"],
            rank_pattern=None if pattern is None else _as_ranks(pattern),
            train_head=tuple(heads) or False,
        )

    def as_in_file(self, delta: Delta, name: str, tensor: Tensor) -> Tensor:
        """See `FactorsType.as_in_file`: Lambda is a column, `(r, 1)`."""
        return tensor[:, None] if name == "Lambda" else tensor

    def as_own(self, delta: Delta, name: str, tensor: Tensor) -> Tensor:
        """See `FactorsType.as_own`."""
        column = name == "Lambda" and tensor.ndim == 2 and tensor.shape[1] == 1
        return tensor[:, 0] if column else tensor


def _alpha(method: AdaLoRA) -> float:
    """Returns the alpha by which PEFT's scale, alpha / (r + 1e-5), is the method's."""
    if method.scale_form == "paper":
        return method.r + 1e-5
    return method.r if method.alpha is None else whole_number(method.alpha)


def _as_flags(method: AdaLoRA) -> dict[str, list[bool]] | None:
    """Returns the ranks as PEFT has them: a flag for each of the first r triplets."""
    if method.rank_pattern is None:
        return None
    return {
        f"{module}{_LAMBDA}": [i < rank for i in range(method.r)]
        for module, rank in method.rank_pattern.items()
    }


def _as_ranks(pattern: Mapping[str, Sequence[bool]]) -> dict[str, int]:
    """Returns PEFT's flags as ranks; a name may still have the adapter's behind it."""
    return {
        name.removeprefix(PREFIX).rpartition(_LAMBDA)[0]: sum(map(bool, flags))
        for name, flags in pattern.items()
    }


TYPE = _AdaLoRA()
