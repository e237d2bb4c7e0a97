"""LN_TUNING: HF PEFT puts a copy of each targeted module, a norm or any other, in its place."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from graftune.anatomy.modules import is_in
from graftune.errors import FormatError
from graftune.formats.peft_common import common_config, own_values
from graftune.formats.peft_types.base import PeftType
from graftune.methods.layernorm import LayerNormTuning
from graftune.sites.base import Graft
from graftune.sites.parameter import OwnValue
from graftune.sites.placing import tensor_names

if TYPE_CHECKING:
    from graftune.adapter import Adapter

_COPY = "ln_tuning_layers"
_IN_COPY = re.compile(rf"\.{_COPY}\.(default\.)?")
"""What PEFT puts into names; it leaves its adapter's name in those of modules with parts."""


class _LnTuning(PeftType):
    """See the module."""

    name = "LN_TUNING"
    method = "LayerNormTuning"
    defaults: ClassVar[Mapping[str, Any]] = {"exclude_modules": None, "target_modules": None}

    def obstacle(self, adapter: Adapter) -> str | None:
        """See `PeftType.obstacle`."""
        tuned = _tuned(adapter)
        for outer in tuned:
            if any(module != outer and is_in(module, (outer,)) for module in tuned):
                return f"HF PEFT can't tune {outer} and a module inside it"
        tied = _tied(adapter.model, adapter.grafts)
        return f"HF PEFT tunes a copy, which is not tied as {tied} are" if tied else None

    def config(self, adapter: Adapter) -> dict[str, Any]:
        """See `PeftType.config`."""
        return {**common_config(adapter, _tuned(adapter)), "peft_type": self.name}

    def tensors(self, adapter: Adapter) -> dict[str, Tensor]:
        """Returns PEFT's copies of whole modules, with the base's tensors where none is trained."""
        named = own_values(adapter, _tuned(adapter))
        for module in _tuned(adapter):
            for name, tensor in adapter.model.get_submodule(module)._parameters.items():
                if tensor is not None:
                    named.setdefault(f"{module}.base_layer.{name}", tensor.detach())
        return {name.replace(".base_layer.", f".{_COPY}."): t for name, t in named.items()}

    def method_of(
        self, config: Mapping[str, Any], modules: Sequence[str], heads: Sequence[str]
    ) -> LayerNormTuning:
        """See `PeftType.method_of`."""
        return LayerNormTuning(targets=tuple(modules), train_head=tuple(heads) or False)

    def own_tensors(
        self, model: nn.Module, grafts: Sequence[Graft], tensors: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """See `PeftType.own_tensors`.

        Raises:
            FormatError: a module's tensor is tied to another's, which PEFT's copy isn't.
        """
        tied = _tied(model, [g for g in grafts if isinstance(g.delta, OwnValue) and g.delta.adds])
        if tied:
            raise FormatError(
                f"LN_TUNING on {tied}, which share one tensor, isn't supported: HF PEFT tunes a "
                "copy of one of them and leaves the other as it was."
            )
        named = {_IN_COPY.sub(".", name): tensor for name, tensor in tensors.items()}
        mine = {graft.place.key for graft in grafts}
        whole = {graft.place.module for graft in grafts}
        base = dict(model.named_parameters())
        return {
            name: tensor
            for name, tensor in named.items()
            if name in mine or name.rpartition(".")[0] not in whole or name not in base
        }


def _tuned(adapter: Adapter) -> list[str]:
    """Returns the modules that PEFT copies: those of own values outside heads saved whole."""
    places = [graft.place.module for graft in adapter.grafts]
    return [m for m in dict.fromkeys(places) if not is_in(m, adapter.head_names)]


def _tied(model: nn.Module, grafts: Sequence[Graft]) -> str:
    """Returns the names of tensors that are one, of the first that a graft changes; "" if none."""
    groups = [names for names in tensor_names(model).values() if len(names) > 1]
    keys = [[f"{module}.{name}" for module, name in names] for names in groups]
    mine = {graft.place.key for graft in grafts}
    return next((" and ".join(group) for group in keys if mine & {*group}), "")


TYPE = _LnTuning()
