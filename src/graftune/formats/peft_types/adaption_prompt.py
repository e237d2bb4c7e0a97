"""ADAPTION_PROMPT: LLaMA-Adapter on the topmost attentions of LLaMA and Mistral.

PEFT passes its answer through the output projection once more, bias included; on GPT-2 it leaves
the projection out. Neither is what the method means, and both are refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from graftune.attached import anatomy_of
from graftune.errors import FormatError
from graftune.formats.peft_common import common_config
from graftune.formats.peft_types.base import PeftType
from graftune.methods.llamaadapter import GatedPrompt, LLaMAAdapter
from graftune.sites.base import Graft

if TYPE_CHECKING:
    from graftune.adapter import Adapter

_NAMES = {"P": "adaption_prompt", "gate": "adaption_gate"}
_ATTENTION = "self_attn"
_MODELS = ("llama", "mistral")


class _AdaptionPrompt(PeftType):
    """See the module."""

    name = "ADAPTION_PROMPT"
    method = "LLaMAAdapter"
    defaults: ClassVar[Mapping[str, Any]] = {
        "adapter_layers": None,
        "adapter_len": None,
        "target_modules": None,
    }

    def obstacle(self, adapter: Adapter) -> str | None:
        """See `PeftType.obstacle`."""
        method, model = adapter.method, adapter.model
        assert isinstance(method, LLaMAAdapter)
        why = _other_equation(model)
        if why is not None:
            return why
        if method.gate != "layer":
            return 'HF PEFT has one gate for each attention (gate="layer")'
        if adapter.head_names:
            return "HF PEFT keeps no heads beside an adaption prompt"
        blocks = [block.path for block in anatomy_of(model).blocks]
        mine = [graft.place.module.removesuffix(f".{_ATTENTION}") for graft in adapter.grafts]
        if mine != blocks[-len(mine) :]:
            return "HF PEFT's adaption prompts are in the topmost blocks, all from one on"
        return None

    def config(self, adapter: Adapter) -> dict[str, Any]:
        """See `PeftType.config`."""
        common = common_config(adapter, ())
        del common["modules_to_save"]
        assert isinstance(adapter.method, LLaMAAdapter)
        return {
            **common,
            "adapter_layers": len(adapter.grafts),
            "adapter_len": adapter.method.length,
            "peft_type": self.name,
            "target_modules": _ATTENTION,
        }

    def read(
        self, model: nn.Module, config: Mapping[str, Any], heads: Sequence[str], where: str
    ) -> LLaMAAdapter:
        """See `PeftType.read`."""
        why = _other_equation(model)
        if why is None and config["target_modules"] not in (None, _ATTENTION):
            why = f'its target_modules is {config["target_modules"]!r}, expected "{_ATTENTION}"'
        if why is not None:
            raise FormatError(f"{where}: {why}.")
        count = len(anatomy_of(model).blocks)
        for key, most in (("adapter_len", None), ("adapter_layers", count)):
            given = config[key]
            is_number = isinstance(given, int) and not isinstance(given, bool)
            if not is_number or given < 1 or (most is not None and given > most):
                wanted = "a number above 0" if most is None else f"1 to {most}"
                raise FormatError(f'{where}: "{key}" is {given!r}; expected {wanted}.')
        return LLaMAAdapter(
            length=config["adapter_len"],
            gate="layer",
            layers=f"{count - config['adapter_layers']}:",
            train_head=False,
        )

    def file_tensors(self, model: nn.Module, grafts: Sequence[Graft]) -> dict[str, Tensor]:
        """See `PeftType.file_tensors`."""
        found: dict[str, Tensor] = {}
        for graft in grafts:
            assert isinstance(graft.delta, GatedPrompt)
            module = graft.place.module
            found[f"{module}.{_NAMES['P']}"] = graft.delta.P.detach()[None]
            found[f"{module}.{_NAMES['gate']}"] = graft.delta.gate.detach()
        return found

    def own_tensors(
        self, model: nn.Module, grafts: Sequence[Graft], tensors: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """See `PeftType.own_tensors`."""
        found = dict(tensors)
        for graft in grafts:
            for own, name in _NAMES.items():
                tensor = found.pop(f"{graft.place.module}.{name}", None)
                if tensor is not None:
                    is_prompt = own == "P" and tensor.ndim == 3 and len(tensor) == 1
                    found[f"{graft.place.key}.{own}"] = tensor[0] if is_prompt else tensor
        return found


def _other_equation(model: nn.Module) -> str | None:
    """Returns why PEFT computes something else on a model, None where it doesn't."""
    config: Any = model.config
    if config.model_type not in _MODELS:
        return (
            f"HF PEFT's adaption prompts are LLaMA-Adapter on {' and '.join(_MODELS)} alone, this "
            f"is {config.model_type}"
        )
    attention: Any = model.get_submodule(f"{anatomy_of(model).blocks[0].path}.{_ATTENTION}")
    if attention.o_proj.bias is not None:
        return "HF PEFT's adaption prompts add the bias of o_proj a second time"
    per_key = attention.k_proj.in_features // attention.k_proj.out_features
    if per_key * config.num_key_value_heads != config.num_attention_heads:
        return (
            "HF PEFT's adaption prompts need as many queries as hidden features, this model has "
            f"{attention.q_proj.out_features} and {attention.q_proj.in_features}"
        )
    return None


TYPE = _AdaptionPrompt()
