"""PROMPT_TUNING: the embeddings of virtual tokens, in front; an encoder-decoder's in its encoder.

For SEQ_2_SEQ_LM PEFT keeps twice as many rows and computes with the first half alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from graftune.formats.peft_prompts import EmbeddedType
from graftune.methods.prompt import PromptTuning

if TYPE_CHECKING:
    from graftune.adapter import Adapter


class _PromptTuning(EmbeddedType):
    """See the module."""

    name = "PROMPT_TUNING"
    method = "PromptTuning"

    def settings(self, adapter: Adapter) -> dict[str, Any]:
        """See `PeftType.settings`; initial values are given, so how they were drawn isn't."""
        return {**super().settings(adapter), "prompt_tuning_init": "RANDOM"}

    def method_of(
        self, config: Mapping[str, Any], modules: Sequence[str], heads: Sequence[str]
    ) -> PromptTuning:
        """See `PeftType.method_of`."""
        return PromptTuning(
            length=config["num_virtual_tokens"],
            position="front",
            train_head=tuple(heads) or False,
        )


TYPE = _PromptTuning()
