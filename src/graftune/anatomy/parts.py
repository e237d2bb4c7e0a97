"""What a pretrained transformer is made of, as plain data: stacks, blocks, spans, projections.

Every path is a module's absolute name in `model.named_modules()`; "" is the model itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Role = Literal["query", "key", "value", "output", "up", "gate", "down", "other"]
"""What a linear map does in its span. "gate" is the half of a gated feed-forward that passes
through the activation, whatever its name; "other" is a module asked for by name without a role."""
SpanKind = Literal["attention", "cross-attention", "ffn"]
Order = Literal["pre", "post", "sandwich", "parallel"]
StackKind = Literal["encoder", "decoder", "vision", "text"]


@dataclass(frozen=True)
class Projection:
    """One role's linear map inside a span.

    Several roles that share a module (fused qkv, fused gate and up) are several projections with
    the same `module` and different `rows`.
    """

    role: Role
    module: str
    """Absolute path of the module that holds the weight (for experts: the experts module)."""
    parameter: str = "weight"
    """The tensor's name in the module; not "weight" for experts kept as 3-D parameters."""
    rows: tuple[tuple[int, int], ...] | None = None
    """Half-open ranges of output features that belong to the role; None when all do."""
    layout: Literal["whole", "contiguous", "interleaved"] = "whole"
    """How a fused module orders its roles: one run each, or one run per head."""

    @property
    def is_fused(self) -> bool:
        """Whether the module also holds other roles."""
        return self.rows is not None

    @property
    def path(self) -> str:
        """The tensor's absolute name."""
        return f"{self.module}.{self.parameter}" if self.module else self.parameter


@dataclass(frozen=True)
class Span:
    """One sublayer of a block: from the tensor that enters it to the one added to the residual."""

    kind: SpanKind
    module: str | None
    """The module that is the whole span, or None (OPT's fc1 and fc2 hang on the block)."""
    projections: tuple[Projection, ...]
    norms: tuple[str, ...]
    """Norms of this sublayer, in the order they run (pre, or post, or both for a sandwich)."""
    inner_norms: tuple[str, ...] = ()
    """Norms inside the span (Qwen3's q_norm and k_norm)."""
    adds_residual: bool = False
    """Whether the module itself adds the residual (BLOOM)."""
    experts: bool = False
    """Whether its weights are 3-D parameters, one slice per expert."""

    def roles(self, *roles: str) -> tuple[Projection, ...]:
        """Returns the projections with one of `roles`."""
        return tuple(p for p in self.projections if p.role in roles)


@dataclass(frozen=True)
class Block:
    """One layer of a stack."""

    path: str
    index: int
    """Position counted over all stacks (encoder 0..L-1, decoder L..)."""
    position: int
    """Position in its own stack."""
    order: Order
    width: int
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class Stack:
    """A chain of blocks."""

    kind: StackKind
    path: str
    """Path of the ModuleList (of the first, where a stack has several, as Swin's stages)."""
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Anatomy:
    """Everything graftune knows of a model."""

    model_type: str
    stacks: tuple[Stack, ...]
    input_embeddings: tuple[str, ...]
    """Paths of token or patch embeddings that feed the stacks."""
    output_embeddings: str | None
    """Path of the language-model head, if the model has one."""
    heads: tuple[str, ...]
    """Modules on top of the pretrained body, other than a language-model head."""
    new_heads: tuple[str, ...]
    """Those of `heads` that pretraining did not train (or can't be shown to have)."""
    norms: tuple[str, ...]
    """Every normalisation module of the model."""
    biases: tuple[str, ...]
    """Absolute names of every bias vector (of linears, convolutions and norms)."""
    tied: tuple[tuple[str, ...], ...]
    """Groups of tensor names that are one tensor."""
    read_by_parent: tuple[str, ...] = ()
    """Modules that never run: their parent reads their tensors."""
    once_for_all_rows: tuple[str, ...] = ()
    """Modules that see one input for all rows of a batch."""
    missing: tuple[str, ...] = ()
    """What could not be found, one clear line each; empty when the anatomy is whole."""

    @property
    def blocks(self) -> tuple[Block, ...]:
        """All blocks of all stacks, in the order of `Block.index`."""
        return tuple(block for stack in self.stacks for block in stack.blocks)

    @property
    def positions(self) -> dict[str, int]:
        """Positions of the blocks in their own stacks, by path."""
        return {block.path: block.position for block in self.blocks}

    @property
    def depth(self) -> int:
        """Blocks of the deepest stack."""
        return max((len(stack.blocks) for stack in self.stacks), default=0)

    def __str__(self) -> str:
        from graftune.anatomy.printing import render

        return render(self)
