"""ReFT: changes what blocks answer, at a few tokens (Wu et al. 2024, representation finetuning).

    LoReFT   h + R^T (W h + b - R h)     R R^T = I      W, R (r, d), b (r)
    NoReFT   h + R^T (W h + b - R h)     R free
    DiReFT   h + R^T (W h + b)           R free

h is the block's answer at each of the first p and the last s real tokens, with tensors of their own
for the first and for the last, unless tied. R of LoReFT is Q of the QR of B^T, B trained.
R starts orthonormal (NoReFT: as torch's linears), W = R (DiReFT: 0), b = 0. Identity at init: yes,
bit for bit, without an activation; `init="paper"` draws W and b as torch's linears. Merge: no.
Count: 2 r d + r for each block, twice where both ends have their own. arXiv 2404.03592, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftune.anatomy import Anatomy
from graftune.anatomy.layers import pick_layers
from graftune.anatomy.parts import Block
from graftune.errors import AnatomyError, SettingsError
from graftune.methods._maps import ACTIVATIONS
from graftune.methods.base import Method, register
from graftune.sites import hosts
from graftune.sites.base import Graft, Seen, SublayerDelta, SublayerPlace
from graftune.sites.ends import ends


def orthonormal(basis: Tensor) -> Tensor:
    """Returns the rows that Gram and Schmidt make of those of `basis`, `(r, d)`."""
    Q, T = torch.linalg.qr(basis.mT)
    signs = torch.where(T.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(Q.dtype)
    return (Q * signs).mT


class Intervention(nn.Module):
    """R^T (phi(W h + b) - R h). Shapes: basis (r, d), R or what it is made of; W (r, d); b (r)."""

    basis: nn.Parameter
    W: nn.Parameter
    b: nn.Parameter

    def __init__(self, settings: ReftMethod, width: int, options: Any) -> None:
        super().__init__()
        self.is_orthonormal, self.subtracts = settings.is_orthonormal, settings.subtracts
        self.phi = settings.activation
        shape = (settings.r, width)
        self.basis = nn.Parameter(torch.empty(shape, **options))
        self.W = nn.Parameter(torch.empty(shape, **options))
        self.b = nn.Parameter(torch.empty(settings.r, **options))

    def R(self) -> Tensor:
        """Returns R, `(r, d)`."""
        return orthonormal(self.basis) if self.is_orthonormal else self.basis

    def start(self, init: str) -> None:
        """Sets the initial values."""
        with torch.no_grad():
            if self.is_orthonormal:
                self.basis.copy_(orthonormal(self.basis.normal_()))
            else:
                nn.init.kaiming_uniform_(self.basis, a=math.sqrt(5))
            if init == "paper":
                nn.init.kaiming_uniform_(self.W, a=math.sqrt(5))
                nn.init.uniform_(self.b, -(self.W.shape[1] ** -0.5), self.W.shape[1] ** -0.5)
                return
            self.W.copy_(self.R()) if self.subtracts else self.W.zero_()
            self.b.zero_()

    def forward(self, h: Tensor) -> Tensor:
        """Returns what is added to h, `(..., d)`."""
        R, W, b = self.R(), self.W, self.b
        if self.subtracts and self.phi == "identity":
            return F.linear(h, W - R, b) @ R  # zero where W is R
        source = ACTIVATIONS[self.phi](F.linear(h, W, b))
        return (source - F.linear(h, R) if self.subtracts else source) @ R


class ReftDelta(SublayerDelta):
    """The interventions on one block's answer.

    Tensors: `first.basis`, `first.W`, `first.b`, and `last.` likewise; or `both.`, tied.
    """

    needs_masks = True

    def __init__(self, settings: ReftMethod, stack: str, width: int, options: Any) -> None:
        super().__init__()
        self.stack, self.asks = stack, settings.name
        self.p, self.s = settings.prefix_positions, settings.suffix_positions
        self.dropout = settings.dropout
        for part in settings.units:
            self.add_module(part, Intervention(settings, width, options))

    def start(self, init: str) -> None:
        """Sets the initial values."""
        for part in self.children():
            cast(Intervention, part).start(init)

    def forward(self, h: Tensor, seen: Seen) -> Tensor:
        """See `SublayerDelta.forward`."""
        found = ends(self.stack, h, self.p, self.s, self.asks)
        for name, chosen in zip(("first", "last"), found, strict=True):
            if chosen is not None:
                part = self._modules.get("both") or self._modules[name]
                h = chosen.changed(h, lambda x, unit=part: self.intervened(x, unit))
        return h

    def intervened(self, h: Tensor, part: Any) -> Tensor:
        """Returns h at the tokens of an intervention, `(rows, n, d)`, changed."""
        change = part(h.to(part.W.dtype))
        new = h + change.to(h.dtype)
        return F.dropout(new, self.dropout) if self.dropout and self.training else new


@dataclass(frozen=True, kw_only=True)
class ReftMethod(Method):
    """What the three have in common."""

    paper: ClassVar[str] = "Wu et al. 2024, ReFT: Representation Finetuning for Language Models"
    default_lr: ClassVar[float] = 9e-4
    subtracts: ClassVar[bool] = True

    r: int = 4
    """Features in which h is changed: 1 to 8 in the paper."""
    prefix_positions: int = 3
    """p, first tokens of each row that are changed: 1 to 7 in the paper."""
    suffix_positions: int = 0
    """s, last tokens of each row that are changed; in generation the last of the prompt."""
    tied: bool = False
    """Use one intervention for the first and the last tokens of a block."""
    activation: str = "identity"
    """phi on W h + b: identity as published, relu, gelu, gelu_tanh, silu, tanh, sigmoid, ..."""
    dropout: float = 0.0
    """Chance that a feature of a changed token, h and all, is dropped in training."""
    init: str = "identity"
    """How it starts: "identity" as the base, "paper" with a random W and b."""
    layers: int | str | tuple[int, ...] | None = None
    """Blocks that are changed: an index, a list, or a slice such as "6:"; None for all."""

    @property
    def is_orthonormal(self) -> bool:
        """Whether the rows of R are kept orthonormal."""
        return False

    @property
    def units(self) -> tuple[str, ...]:
        """Names of a block's interventions."""
        if self.tied:
            return ("both",)
        found = (("first", self.prefix_positions), ("last", self.suffix_positions))
        return tuple(name for name, positions in found if positions)

    def check(self) -> None:
        """See `Method.check`."""
        self._check_number("r", 1)
        self._check_number("prefix_positions", 0)
        self._check_number("suffix_positions", 0)
        self._check_number("dropout", 0, 1, open_high=True)
        self._check_choice("activation", tuple(ACTIVATIONS))
        self._check_choice("init", ("identity", "paper"))
        if not self.prefix_positions + self.suffix_positions:
            raise SettingsError(
                f"{self.name}: prefix_positions and suffix_positions are 0, so that no token is "
                "changed: set one of them to at least 1."
            )

    def plan(self, model: nn.Module, anatomy: Anatomy, *, empty: bool = False) -> list[Graft]:
        """See `Method.plan`.

        Raises:
            AnatomyError: the model has no blocks, or `layers` doesn't fit them.
            SettingsError: more orthonormal rows than there are features.
        """
        grafts: list[Graft] = []
        for stack, block in self.places(anatomy):
            if self.is_orthonormal and self.r > block.width:
                raise SettingsError(
                    f"{self.name}: r is {self.r}, but {block.path} has {block.width} features, so "
                    f"that no more rows can be orthonormal: take at most {block.width}."
                )
            options = hosts.delta_options(model.get_submodule(block.path))
            delta = ReftDelta(self, stack, block.width, options)
            if not empty:
                delta.start(self.init)
            grafts.append(Graft(SublayerPlace(block.path, block.path, block.path), delta))
        return grafts

    def count(self, model: nn.Module, anatomy: Anatomy) -> int:
        """See `Method.count`: 2 r d + r for each intervention."""
        widths = (block.width for _, block in self.places(anatomy))
        return len(self.units) * sum(2 * self.r * width + self.r for width in widths)

    def places(self, anatomy: Anatomy) -> Iterator[tuple[str, Block]]:
        """Yields each block that is changed, and the kind of its stack."""
        wanted = anatomy.blocks if self.layers is None else pick_layers(anatomy, self.layers)
        if not wanted:
            raise AnatomyError(
                f"{self.name} changes what blocks answer, and in this {anatomy.model_type} none "
                "were found; gt.anatomy(model) shows what was."
            )
        paths = {block.path for block in wanted}
        for stack in anatomy.stacks:
            yield from ((stack.kind, block) for block in stack.blocks if block.path in paths)


@register
@dataclass(frozen=True, kw_only=True)
class LoReFT(ReftMethod):
    """A few features of a few tokens, in orthonormal directions, set to a linear map of theirs.

    Merge: not possible, it acts on some tokens alone.
    """

    name: ClassVar[str] = "LoReFT"
    summary: ClassVar[str] = "Blocks' answers at a few tokens, moved in orthonormal directions."

    @property
    def is_orthonormal(self) -> bool:
        """See `ReftMethod.is_orthonormal`."""
        return True


@register
@dataclass(frozen=True, kw_only=True)
class NoReFT(ReftMethod):
    """LoReFT without the constraint on its directions.

    Merge: not possible, it acts on some tokens alone.
    """

    name: ClassVar[str] = "NoReFT"
    summary: ClassVar[str] = "LoReFT with free directions: faster to train."


@register
@dataclass(frozen=True, kw_only=True)
class DiReFT(ReftMethod):
    """A LoRA on what blocks answer, at a few tokens.

    Merge: not possible, it acts on some tokens alone.
    """

    name: ClassVar[str] = "DiReFT"
    summary: ClassVar[str] = "A LoRA on blocks' answers, at a few tokens: the cheapest ReFT."
    subtracts: ClassVar[bool] = False

    orthogonal: bool = False
    """Keep the rows of R orthonormal: not so in the paper, but in its authors' library."""

    @property
    def is_orthonormal(self) -> bool:
        """See `ReftMethod.is_orthonormal`."""
        return self.orthogonal
