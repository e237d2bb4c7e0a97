"""LLaMA-Adapter: a few vectors that the upper attentions see apart, through a gate from zero on.

    out = W_o (Attn(q, K, V) + g Attn(q, P W_k, P W_v))         P (K, d), g of each attention
    g = tanh(gate), one gate per head (the authors' code); or gate itself, one per layer (HF PEFT)

W_k and W_v are the model's own, frozen, biases included; q is rotated, P W_k is not: P has no
position, and the two softmaxes know nothing of each other. P ~ N(0, 1), gate = 0. Identity at
init: yes. In inference P W_k and P W_v are kept until a tensor of theirs changes. Merge: no.
Count: L (K d + gates). Zhang et al. 2023, arXiv 2303.16199, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftune.anatomy import Anatomy, Block, Projection
from graftune.anatomy.layers import pick_layers
from graftune.anatomy.modules import leaf
from graftune.methods._attentions import Attention, attentions_of
from graftune.methods.base import Method, register
from graftune.sites import hosts
from graftune.sites.base import AttentionDelta, AttentionPlace, Graft
from graftune.sites.remembered import Remembered, autocast

GATES = ("head", "layer")
Rows = tuple[tuple[int, int], ...] | None


class GatedPrompt(AttentionDelta):
    """The vectors of one attention and their gate. Shapes: P (K, d), gate (heads) or (1)."""

    P: nn.Parameter
    gate: nn.Parameter

    def __init__(self, P: Tensor, gate: Tensor, is_bounded: bool, one: Attention) -> None:
        super().__init__()
        self.P, self.gate, self.is_bounded = nn.Parameter(P), nn.Parameter(gate), is_bounded
        inside = len(one.place.module) + 1
        self.maps = [(part.module[inside:], part.rows) for part in one.maps]
        self.kept = Remembered()
        norms = [path[inside:] for path in one.norms if leaf(path).startswith("k")]
        self.norm = norms[0] if norms else None

    def train(self, mode: bool = True) -> GatedPrompt:
        """Forgets what is kept for inference, whichever way the mode turns."""
        self.kept.forget()
        return super().train(mode)

    def added(self, query: Tensor, module: nn.Module, scaling: float | None) -> Tensor:
        """See `AttentionDelta.added`."""
        sources = self._sources(module)
        if sources is None:
            self.kept.forget()
            key, value = self._seen(query, module)
        else:
            settings = (query.dtype, query.shape[1], query.shape[3], autocast(query.device.type))
            key, value = self.kept.get(sources, settings, lambda: self._seen(query, module))
        key, value = (of.expand(len(query), -1, -1, -1) for of in (key, value))
        answer = F.scaled_dot_product_attention(query, key, value, scale=scaling)
        gate = torch.tanh(self.gate) if self.is_bounded else self.gate
        return (gate[:, None, None].to(answer.dtype) * answer).transpose(1, 2)

    def _seen(self, query: Tensor, module: nn.Module) -> tuple[Tensor, Tensor]:
        """Returns P W_k and P W_v by the query's heads, `(H, K, D)` each."""
        groups, size = query.shape[1], query.shape[3]
        key, value = (
            _projected(module, path, rows, self.P, query.dtype) for path, rows in self.maps
        )
        if self.norm is not None:
            key = _normed(module.get_submodule(self.norm), key)
        key = key.view(len(key), -1, size).transpose(0, 1)  # (kv heads, K, D)
        value = value.view(len(value), len(key), -1).transpose(0, 1)
        return (
            key.repeat_interleave(groups // len(key), 0),
            value.repeat_interleave(groups // len(value), 0),
        )

    def _sources(self, module: nn.Module) -> list[Tensor] | None:
        """Returns the tensors that P W_k and P W_v are made of; None where they aren't kept."""
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        names = [path for path, _ in self.maps] + ([] if self.norm is None else [self.norm])
        found = [self.P]
        for host in map(module.get_submodule, dict.fromkeys(names)):
            if host._modules.keys() - {"deltas"}:
                return None
            found += [*host._parameters.values(), *host._buffers.values()]
        return [tensor for tensor in found if tensor is not None]


def _projected(module: nn.Module, path: str, rows: Rows, P: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns P W of the base alone: hooks, with which adapters act, aren't called."""
    host: Any = module.get_submodule(path)
    made: Tensor = host.forward(P.to(dtype))
    return made if rows is None else torch.cat([made[:, start:stop] for start, stop in rows], 1)


def _normed(norm: Any, key: Tensor) -> Tensor:
    """Returns keys after the model's own norm of keys, by head or over all."""
    return norm.forward(key.view(len(key), -1, norm.weight.shape[-1])).flatten(1)


@register
@dataclass(frozen=True, kw_only=True)
class LLaMAAdapter(Method):
    """Trains vectors that the upper self-attentions see through a gate that opens in training.

    Merge: not possible, the vectors have a softmax of their own.
    """

    name: ClassVar[str] = "LLaMAAdapter"
    paper: ClassVar[str] = (
        "Zhang et al. 2023, LLaMA-Adapter: Efficient Fine-tuning of Language Models with "
        "Zero-init Attention"
    )
    summary: ClassVar[str] = "Gated prompts in the upper attentions, shut at the start."
    default_lr: ClassVar[float] = 9e-3

    length: int = 10
    """K: vectors of each attention."""
    gate: str = "head"
    """"head": one per head, through tanh, as the authors' code; "layer": one each, as HF PEFT."""
    layers: int | str | tuple[int, ...] | None = None
    """Blocks that get one: an index, a list, or a slice such as "-30:"; None for all but the two
    lowest of each stack, and never less than half of it."""

    def check(self) -> None:
        """See `Method.check`."""
        self._check_number("length", 1)
        self._check_choice("gate", GATES)

    def plan(self, model: nn.Module, anatomy: Anatomy, *, empty: bool = False) -> list[Graft]:
        """See `Method.plan`.

        Raises:
            SettingsError: an attention that nothing can be added to.
        """
        return [self._graft(model, one, empty) for one in self._places(model, anatomy)]

    def count(self, model: nn.Module, anatomy: Anatomy) -> int:
        """See `Method.count`."""
        return sum(
            self.length * _width(model, one) + (one.heads if self.gate == "head" else 1)
            for one in self._places(model, anatomy)
        )

    def _places(self, model: nn.Module, anatomy: Anatomy) -> list[Attention]:
        blocks = _upper(anatomy) if self.layers is None else pick_layers(anatomy, self.layers)
        return list(attentions_of(self.name, model, anatomy, ("attention",), blocks))

    def _graft(self, model: nn.Module, one: Attention, empty: bool) -> Graft:
        P = torch.empty(self.length, _width(model, one), **one.options)
        gate = torch.zeros(one.heads if self.gate == "head" else 1, **one.options)
        delta = GatedPrompt(P if empty else P.normal_(), gate, self.gate == "head", one)
        return Graft(AttentionPlace(one.place.module, one.place.kind, "prompt"), delta)


def _width(model: nn.Module, one: Attention) -> int:
    """Returns d, what enters the keys' projection."""
    part: Projection = one.maps[0]
    return hosts.features(model.get_submodule(part.module))[0]


def _upper(anatomy: Anatomy) -> Sequence[Block]:
    """Returns all blocks but the two lowest of each stack, and no less than half of it."""
    return [
        block
        for stack in anatomy.stacks
        for block in stack.blocks
        if block.position >= min(2, len(stack.blocks) // 2)
    ]
