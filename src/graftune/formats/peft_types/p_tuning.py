"""P_TUNING: virtual tokens in front; what made them isn't kept by PEFT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from graftune.formats.peft_prompts import EmbeddedType, embedded
from graftune.methods._soft_prompts import Prompt
from graftune.methods.ptuning import PTuning

if TYPE_CHECKING:
    from graftune.adapter import Adapter
    from graftune.methods.base import Method


class _PTuning(EmbeddedType):
    """See the module."""

    name = "P_TUNING"
    method = "PTuning"
    without_effect = (
        "encoder_dropout",
        "encoder_hidden_size",
        "encoder_num_layers",
        "encoder_reparameterization_type",
    )

    def obstacle(self, adapter: Adapter) -> str | None:
        """See `PeftType.obstacle`."""
        deltas = [graft.delta for graft in embedded(adapter.grafts)]
        if not all(isinstance(delta, Prompt) for delta in deltas):
            return "HF PEFT keeps no encoder of prompts, and this one is in use (adapter.finish())"
        if any(delta.marker is not None for delta in deltas):
            return "HF PEFT puts prompts in front, and this one goes where its marker stands"
        return super().obstacle(adapter)

    def settings(self, adapter: Adapter) -> dict[str, Any]:
        """See `PeftType.settings`; of the encoder, which PEFT makes anew to train, its defaults."""
        found = super().settings(adapter)
        return {
            **found,
            "encoder_dropout": 0.0,
            "encoder_hidden_size": found["token_dim"],
            "encoder_num_layers": 2,
            "encoder_reparameterization_type": "MLP",
        }

    def method_of(
        self, config: Mapping[str, Any], modules: Sequence[str], heads: Sequence[str]
    ) -> PTuning:
        """See `PeftType.method_of`."""
        return PTuning(
            length=config["num_virtual_tokens"],
            encoder="none",
            position="front",
            train_head=tuple(heads) or False,
        )

    def kept(self, method: Method) -> PTuning:
        """See `PeftType.kept`."""
        assert isinstance(method, PTuning)
        return replace(method, encoder="none", hidden=None, dropout=0.0)


TYPE = _PTuning()
