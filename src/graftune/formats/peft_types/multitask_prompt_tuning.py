"""MULTITASK_PROMPT_TUNING: a prompt in front, and for each task what scales its rows and columns.

In a decoder beside an encoder PEFT puts a prompt in its forward pass and none in `generate`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from graftune.errors import FormatError
from graftune.formats.peft_prompts import EMBEDDINGS, EmbeddedType
from graftune.methods.multitaskprompt import MultitaskPromptTuning

if TYPE_CHECKING:
    from graftune.adapter import Adapter


class _MultitaskPromptTuning(EmbeddedType):
    """See the module."""

    name = "MULTITASK_PROMPT_TUNING"
    method = "MultitaskPromptTuning"
    names: ClassVar[Mapping[str, str]] = {
        "tokens": EMBEDDINGS,
        "u": "prefix_task_cols",
        "v": "prefix_task_rows",
    }
    defaults: ClassVar[Mapping[str, Any]] = {
        **EmbeddedType.defaults,
        "num_ranks": 1,
        "num_tasks": 1,
    }
    without_effect = (
        *EmbeddedType.without_effect,
        "prompt_tuning_init_state_dict_path",
        "prompt_tuning_init_task",
    )

    def settings(self, adapter: Adapter) -> dict[str, Any]:
        """See `PeftType.settings`."""
        method = adapter.method
        assert isinstance(method, MultitaskPromptTuning)
        return {
            **super().settings(adapter),
            "num_ranks": method.r,
            "num_tasks": method.tasks,
            "prompt_tuning_init": "RANDOM",
        }

    def read(
        self, model: nn.Module, config: Mapping[str, Any], heads: Sequence[str], where: str
    ) -> Any:
        """See `PeftType.read`."""
        parts = config["num_transformer_submodules"]
        if parts == 2 or (parts is None and config["task_type"] == "SEQ_2_SEQ_LM"):
            raise FormatError(
                f"{where}: it was trained with a second prompt in the decoder "
                "(num_transformer_submodules is 2), which HF PEFT itself leaves out of generate, "
                "and which isn't supported: train it with 1."
            )
        return super().read(model, config, heads, where)

    def method_of(
        self, config: Mapping[str, Any], modules: Sequence[str], heads: Sequence[str]
    ) -> MultitaskPromptTuning:
        """See `PeftType.method_of`."""
        return MultitaskPromptTuning(
            length=config["num_virtual_tokens"],
            position="front",
            tasks=config["num_tasks"],
            r=config["num_ranks"],
            train_head=tuple(heads) or False,
        )


TYPE = _MultitaskPromptTuning()
