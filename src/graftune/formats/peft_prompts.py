"""What HF PEFT's types of prompts have in common: how it runs them by task, and their names.

PEFT puts m virtual tokens before all others, padding too, in a class of its own for each task. An
encoder's classifier then reads the first virtual token: that is `stays=True` here. A decoder beside
an encoder is given a prompt in training that `generate` forgets: neither read nor written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from graftune.attached import anatomy_of
from graftune.errors import FormatError
from graftune.formats.peft_common import PROMPT_PREFIX, common_config, saved_heads, task_type
from graftune.formats.peft_types.base import PeftType
from graftune.sites import hosts
from graftune.sites.base import EmbeddingPlace, Graft

if TYPE_CHECKING:
    from graftune.adapter import Adapter

EMBEDDINGS = "prompt_embeddings"
"""The tensor that holds virtual tokens, or prefixes."""


class PromptsType(PeftType):
    """A type that PEFT runs by a class for the task, with its tensors beside the base's."""

    names: ClassVar[Mapping[str, str]]
    """PEFT's names of a delta's tensors by ours; heads lie beside them."""
    defaults: ClassVar[Mapping[str, Any]] = {
        "num_attention_heads": None,
        "num_layers": None,
        "num_transformer_submodules": None,
        "num_virtual_tokens": None,
        "token_dim": None,
    }

    def config(self, adapter: Adapter) -> dict[str, Any]:
        """See `PeftType.config`; no modules are targeted."""
        common = common_config(adapter, ())
        del common["target_modules"]
        task = prompt_task(adapter.model, adapter.head_names)
        mapped = {"auto_mapping": None, "task_type": task, "peft_type": self.name}
        return {**common, **mapped, **self.settings(adapter)}

    def key(self, name: str) -> str:
        """See `PeftType.key`."""
        return name if name in self.names.values() else PROMPT_PREFIX + name

    def named(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `PeftType.named`."""
        return {name.removeprefix(PROMPT_PREFIX): tensor for name, tensor in tensors.items()}

    def read(
        self, model: nn.Module, config: Mapping[str, Any], heads: Sequence[str], where: str
    ) -> Any:
        """See `PeftType.read`.

        Raises:
            FormatError: PEFT computes something else, or the length isn't known.
        """
        length = config["num_virtual_tokens"]
        if isinstance(length, bool) or not isinstance(length, int) or length < 1:
            raise FormatError(
                f'{where}: "num_virtual_tokens" is {length!r}; expected a number above 0.'
            )
        return self.method_of(config, (), heads)


class EmbeddedType(PromptsType):
    """A type whose virtual tokens are embeddings, in front of the text's."""

    names: ClassVar[Mapping[str, str]] = {"tokens": EMBEDDINGS}
    without_effect = (
        "prompt_tuning_init",
        "prompt_tuning_init_text",
        "tokenizer_kwargs",
        "tokenizer_name_or_path",
    )

    def obstacle(self, adapter: Adapter) -> str | None:
        """See `PeftType.obstacle`."""
        model = adapter.model
        if any(graft.place.stack == "decoder" for graft in embedded(adapter.grafts)):
            return "HF PEFT leaves prompts in a decoder beside an encoder out of generate"
        if not embedded(adapter.grafts):
            return "HF PEFT puts prompts among tokens, and this one enters behind their embeddings"
        if any(graft.delta.is_after_first for graft in embedded(adapter.grafts)):
            return (
                "HF PEFT puts prompts in front, and this one follows the first token "
                '(position="front")'
            )
        task = prompt_task(model, adapter.head_names)
        kind = type(model).__name__
        if task is None:
            return f"HF PEFT runs prompts by task, and has none for this {kind} and its heads"
        if (task == "SEQ_CLS" and _is_encoder(model)) is not _stays(adapter):
            return (
                f"HF PEFT lets the head of this {kind} read the first virtual token (stays=True)"
                if task == "SEQ_CLS"
                else "HF PEFT takes virtual tokens out of what this kind of head reads"
            )
        if _trains_embeddings(adapter):
            return "HF PEFT looks tokens up in the base's embeddings, and this adapter trains them"
        return None

    def settings(self, adapter: Adapter) -> dict[str, Any]:
        """See `PeftType.settings`."""
        model = adapter.model
        [graft] = embedded(adapter.grafts)
        body: Any = model.get_submodule(graft.place.module)
        return {
            **sizes(model),
            "num_transformer_submodules": 1,
            "num_virtual_tokens": graft.delta.length,
            "token_dim": hosts.features(body.get_input_embeddings())[1],
        }

    def read(
        self, model: nn.Module, config: Mapping[str, Any], heads: Sequence[str], where: str
    ) -> Any:
        """See `PromptsType.read`: the head of an encoder's classifier reads a virtual token."""
        method = super().read(model, config, heads, where)
        if config["task_type"] == "SEQ_CLS" and _is_encoder(model):
            return dataclasses.replace(method, stays=True)
        return method

    def file_tensors(self, model: nn.Module, grafts: Sequence[Graft]) -> dict[str, Tensor]:
        """See `PeftType.file_tensors`."""
        [graft] = embedded(grafts)
        tensors = graft.delta.named_parameters()
        return {self.names[own]: tensor.detach() for own, tensor in tensors}

    def own_tensors(
        self, model: nn.Module, grafts: Sequence[Graft], tensors: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """See `PeftType.own_tensors`: of an encoder-decoder's, PEFT uses the first half alone."""
        found, [graft] = dict(tensors), embedded(grafts)
        for own, name in self.names.items():
            tensor = found.pop(name, None)
            if tensor is not None:
                length = len(tensor) // 2
                is_double = (
                    own == "tokens"
                    and length == graft.delta.length
                    and len(anatomy_of(model).stacks) > 1
                )
                found[f"{graft.place.key}.{own}"] = tensor[:length] if is_double else tensor
        return found


def embedded(grafts: Sequence[Graft]) -> list[Any]:
    """Returns those of an adapter's grafts that add virtual tokens."""
    return [graft for graft in grafts if isinstance(graft.place, EmbeddingPlace)]


def sizes(model: nn.Module) -> dict[str, Any]:
    """Returns what PEFT asks of a model beside a prompt's own shape."""
    config: Any = model.config
    text = config.get_text_config()
    return {
        "num_attention_heads": getattr(text, "num_attention_heads", 1),
        "num_layers": max(len(stack.blocks) for stack in anatomy_of(model).stacks),
    }


def prompt_task(model: nn.Module, heads: Sequence[str]) -> str | None:
    """Returns PEFT's name of the task whose class runs a prompt on a model, None for none."""
    stacks = anatomy_of(model).stacks
    task = task_type(model, heads)
    if len(stacks) > 1:
        return task if task == "SEQ_2_SEQ_LM" else None
    name = type(model).__name__
    if task is None and name.endswith("Model") and not name.endswith("LMHeadModel"):
        return "FEATURE_EXTRACTION"
    return task


def _trains_embeddings(adapter: Adapter) -> bool:
    """Whether the token embeddings are among the modules saved whole, tied to a head or not."""
    [graft] = embedded(adapter.grafts)
    body: Any = adapter.model.get_submodule(graft.place.module)
    table = body.get_input_embeddings()
    return any(
        table in adapter.model.get_submodule(head).modules() for head in saved_heads(adapter)
    )


def _stays(adapter: Adapter) -> bool:
    return bool(getattr(adapter.method, "stays", False))


def _is_encoder(model: nn.Module) -> bool:
    return anatomy_of(model).stacks[0].kind == "encoder" and len(anatomy_of(model).stacks) == 1
