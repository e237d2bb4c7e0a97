"""PREFIX_TUNING: what stands first in the cache of every self-attention, rotated or not.

    prompt_embeddings (m, 2 L kv)    key and value of layer 0, of layer 1, ...; of an MLP its answer

PEFT's prefix takes the first m positions, so that text begins at m: `shift_positions`. Where a
position is a bias on scores (ALiBi, T5) PEFT's prefixes get one too, and ours have none; a window
hides only PEFT's. Beside an encoder PEFT gives layer i the pair 2 i mod L, so that two layers share
one and others are in no layer: neither read nor written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from graftune.anatomy.fused import head_size
from graftune.attached import anatomy_of
from graftune.errors import BaseMismatchError, FormatError
from graftune.formats.peft_prompts import EMBEDDINGS, PromptsType, prompt_task, sizes
from graftune.methods._prefix import PrefixValues
from graftune.methods.prefix import PrefixTuning
from graftune.sites.base import AttentionPlace, Graft
from graftune.sites.entrance import above

if TYPE_CHECKING:
    from graftune.adapter import Adapter
    from graftune.methods.base import Method


class _PrefixTuning(PromptsType):
    """See the module."""

    name = "PREFIX_TUNING"
    method = "PrefixTuning"
    also = ("PTuningV2",)
    names: ClassVar[Mapping[str, str]] = {"prefixes": EMBEDDINGS}
    without_effect = ("encoder_hidden_size", "init_weights", "prefix_projection")

    def obstacle(self, adapter: Adapter) -> str | None:
        """See `PeftType.obstacle`."""
        model, method = adapter.model, adapter.method
        assert isinstance(method, PrefixTuning)
        prefixes = _prefixes(adapter.grafts)
        if not all(isinstance(graft.delta, PrefixValues) for graft in prefixes):
            return "HF PEFT keeps no MLP of prefixes, and this one's is in use (adapter.finish())"
        if prompt_task(model, adapter.head_names) is None:
            kind = type(model).__name__
            return f"HF PEFT runs prefixes by task, and has none for this {kind} and its heads"
        why = _other_equation(model)
        if why is not None:
            return why
        if method.position == "infix":
            return "HF PEFT's prefixes are seen by all tokens, and this one is an infix"
        if not method.shift_positions:
            return "HF PEFT's prefixes take positions, and this one has none (shift_positions=True)"
        if [graft.place.module for graft in prefixes] != _attentions(model):
            return "HF PEFT's prefixes are in all self-attentions, and in no others"
        if len({tensor.shape for graft in prefixes for _, tensor in graft.tensors()}) > 1:
            return "HF PEFT's prefixes are of one width in all layers"
        return None

    def settings(self, adapter: Adapter) -> dict[str, Any]:
        """See `PeftType.settings`."""
        model = adapter.model
        first: Any = _prefixes(adapter.grafts)[0]
        length, width = first.delta.key.shape
        return {
            **sizes(model),
            "encoder_hidden_size": width,
            "num_attention_heads": width // head_size(model.get_submodule(first.place.module)),
            "num_transformer_submodules": 1,
            "num_virtual_tokens": length,
            "prefix_projection": False,
            "token_dim": width,
        }

    def read(
        self, model: nn.Module, config: Mapping[str, Any], heads: Sequence[str], where: str
    ) -> Method:
        """See `PromptsType.read`."""
        why = _other_equation(model)
        if why is not None:
            raise FormatError(f"{where}: {why}.")
        return super().read(model, config, heads, where)

    def method_of(
        self, config: Mapping[str, Any], modules: Sequence[str], heads: Sequence[str]
    ) -> PrefixTuning:
        """See `PeftType.method_of`."""
        return PrefixTuning(
            length=config["num_virtual_tokens"],
            hidden=None,
            sublayers=("attention",),
            shift_positions=True,
            train_head=tuple(heads) or False,
        )

    def kept(self, method: Method) -> PrefixTuning:
        """See `PeftType.kept`."""
        assert isinstance(method, PrefixTuning)
        return replace(method, hidden=None)

    def file_tensors(self, model: nn.Module, grafts: Sequence[Graft]) -> dict[str, Tensor]:
        """See `PeftType.file_tensors`."""
        parts = (
            part for graft in _prefixes(grafts) for part in (graft.delta.key, graft.delta.value)
        )
        return {EMBEDDINGS: torch.cat([part.detach() for part in parts], dim=1)}

    def own_tensors(
        self, model: nn.Module, grafts: Sequence[Graft], tensors: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """See `PeftType.own_tensors`.

        Raises:
            BaseMismatchError: the table is of another shape.
        """
        found, prefixes = dict(tensors), _prefixes(grafts)
        whole = found.pop(EMBEDDINGS, None)
        if whole is None:
            return found
        length, width = prefixes[0].delta.key.shape
        shape = (length, 2 * len(prefixes) * width)
        if whole.shape != shape:
            raise BaseMismatchError(
                f'"{EMBEDDINGS}" is {tuple(whole.shape)}, this model needs {shape}: it was made '
                "for another."
            )
        parts = iter(whole.split(width, dim=1))
        for graft in prefixes:
            found |= {f"{graft.place.key}.{name}": next(parts) for name in ("key", "value")}
        return found


def _prefixes(grafts: Sequence[Graft]) -> list[Any]:
    return [graft for graft in grafts if isinstance(graft.place, AttentionPlace)]


def _attentions(model: nn.Module) -> list[str]:
    """Returns the attentions that get a prefix of PEFT's, by name."""
    spans = (span for block in anatomy_of(model).blocks for span in block.spans)
    return [
        span.roles("query")[0].module.rpartition(".")[0]
        for span in spans
        if span.kind == "attention"
    ]


def _other_equation(model: nn.Module) -> str | None:
    """Returns why PEFT computes something else on a model, or nothing; None where it doesn't."""
    anatomy, kind = anatomy_of(model), type(model).__name__
    config: Any = model.config
    has_bias = any(hasattr(module, "relative_attention_bias") for module in model.modules())
    if has_bias or getattr(config, "alibi", False) or config.model_type in ("bloom", "mpt"):
        return (
            f"HF PEFT's prefixes take positions, which bias the attention of this {kind}; ours "
            "have none"
        )
    if len(anatomy.stacks) > 1:
        return f"HF PEFT lets layers of this {kind} share prefixes and leaves others out"
    if above(model, anatomy.blocks[0].path, {"input_ids", "past_key_values"}) is None:
        return f"HF PEFT puts prefixes into a cache, and this {kind} takes none"
    return None


TYPE = _PrefixTuning()
