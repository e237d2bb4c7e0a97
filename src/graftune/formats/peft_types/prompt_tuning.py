"""PROMPT_TUNING: the embeddings of virtual tokens, in front; an encoder-decoder's in its encoder.

For SEQ_2_SEQ_LM PEFT keeps twice as many rows and computes with the first half alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from graftune.formats.peft_prompts import EMBEDDINGS, EmbeddedType, embedded, encoders_rows
from graftune.methods.prompt import PromptTuning
from graftune.sites.base import Graft

if TYPE_CHECKING:
    from graftune.adapter import Adapter


class _PromptTuning(EmbeddedType):
    """See the module."""

    name = "PROMPT_TUNING"
    method = "PromptTuning"
    without_effect = (
        "prompt_tuning_init",
        "prompt_tuning_init_text",
        "tokenizer_kwargs",
        "tokenizer_name_or_path",
    )

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

    def file_tensors(self, model: nn.Module, grafts: Sequence[Graft]) -> dict[str, Tensor]:
        """See `PeftType.file_tensors`."""
        [graft] = embedded(grafts)
        return {EMBEDDINGS: graft.delta.tokens.detach()}

    def own_tensors(
        self, model: nn.Module, grafts: Sequence[Graft], tensors: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """See `PeftType.own_tensors`."""
        found, [graft] = dict(tensors), embedded(grafts)
        if EMBEDDINGS in found:
            rows = encoders_rows(model, found.pop(EMBEDDINGS), len(graft.delta.tokens))
            found[f"{graft.place.key}.tokens"] = rows
        return found


TYPE = _PromptTuning()
