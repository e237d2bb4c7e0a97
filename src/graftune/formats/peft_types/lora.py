"""LORA: HF PEFT's LoRA, all its settings; reading and writing have files of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from graftune import adapter as adapters
from graftune.adapter import Planned
from graftune.formats import peft_reading, peft_settings, peft_writing
from graftune.formats.factors import Slice
from graftune.formats.filling import own_method
from graftune.formats.peft_common import without_prefix
from graftune.formats.peft_types.base import PeftType
from graftune.methods.base import Method
from graftune.methods.lora import LoRA
from graftune.sites.base import base_modules

if TYPE_CHECKING:
    from graftune.adapter import Adapter
    from graftune.anatomy import Anatomy
    from graftune.formats.directory import Directory


class _Lora(PeftType):
    """See the module."""

    name = "LORA"
    method = "LoRA"

    def config(self, adapter: Adapter) -> dict[str, Any]:
        """See `PeftType.config`."""
        return peft_writing.config(adapter)

    def tensors(self, adapter: Adapter) -> dict[str, Tensor]:
        """See `PeftType.tensors`."""
        return peft_writing.tensors(adapter)

    def load(
        self,
        model: nn.Module,
        found: Directory,
        tensors: Mapping[str, Tensor],
        where: str,
        name: str,
    ) -> Adapter:
        """See `PeftType.load`."""
        config = peft_settings.checked(found.config, where)
        modules = base_modules(model)
        added = peft_settings.TASK_HEADS.get(str(config["task_type"]), ())
        config["modules_to_save"] = [*peft_settings.names(config["modules_to_save"]), *added]
        saved = tuple(peft_settings.saved_modules(config, modules))
        method: Method
        if found.own is None:
            places = [
                m if p == "weight" else f"{m}.{p}" for m, p in peft_reading.adapted(modules, config)
            ]
            method, heads = peft_reading.method_of(config, saved, places), saved
        else:
            method, heads = own_method(found), tuple(found.own.get("heads", ()))
        assert isinstance(method, LoRA)
        reading = peft_reading.Reading(
            where=where,
            model=model,
            modules=modules,
            config=config,
            tensors=without_prefix(tensors),
            method=method,
            slices=_slices(found.own or {}),
            own=found.own is not None,
            heads=saved,
            values=None if found.own is None else found.own.get("values", {}),
        )

        def plan(parts: Anatomy) -> Planned:
            grafts = peft_reading.grafts(reading, parts)
            peft_reading.fill(grafts, reading)
            return Planned(method, grafts, heads)

        return adapters.attach_planned(model, method, name, plan)


def _slices(own: Mapping[str, Any]) -> dict[str, list[Slice]]:
    found: dict[str, list[Slice]] = {}
    for group in own.get("slices", []):
        parts = [
            Slice(role=p["role"], rank=p["rank"], rows=tuple((a, b) for a, b in p["rows"]))
            for p in group["parts"]
        ]
        found |= dict.fromkeys(group["modules"], parts)
    return found


TYPE = _Lora()
