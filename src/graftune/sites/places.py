"""The places where sites act, as plain data: which module, and what of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn

from graftune.sites import hosts


class PlaceBeside:
    """A place beside the base's tensors, of which it changes no entry."""

    site: ClassVar[str]
    """Name of the site among those of the host."""
    parameter: ClassVar[str] = ""
    name: str
    """What is there, for the names of its tensors."""
    module: str

    @property
    def key(self) -> str:
        """What the names of the tensors at this place begin with."""
        return f"{self.module}.{self.name}" if self.module else self.name

    def size(self, host: nn.Module) -> int:
        """Returns 0: it changes no entry of the base."""
        return 0


@dataclass(frozen=True)
class EmbeddingPlace(PlaceBeside):
    """Where token ids become embeddings."""

    site: ClassVar[str] = "embedding"
    name = "prompt"
    module: str
    """The body: takes `input_ids` or `inputs_embeds`."""
    reader: str | None = None
    """The decoder that attends to what the body answers, of an encoder-decoder."""
    stack: str | None = None
    """The kind of its stack, of an encoder-decoder."""


@dataclass(frozen=True)
class HiddenPlace(PlaceBeside):
    """Behind the embedding layer of a body."""

    site: ClassVar[str] = "hidden"
    name = "prompt"
    module: str
    """The body."""
    embeddings: str
    """Its embedding layer."""


@dataclass(frozen=True)
class AttentionPlace(PlaceBeside):
    """One attention of a block."""

    site: ClassVar[str] = "attention"
    module: str
    """The module that calls the attention function."""
    kind: str = "attention"
    name: str = "prefix"
    biases: str | None = None
    """The attention that has the relative biases of this one (T5: that of the first block)."""


@dataclass(frozen=True)
class LinearPlace:
    """The output of a host, or those of its features in `rows`; or its input."""

    module: str
    role: str = "output"
    rows: tuple[tuple[int, int], ...] | None = None
    parameter: str = "weight"
    side: Literal["output", "input"] = "output"

    @property
    def key(self) -> str:
        """What the names of the tensors at this place begin with."""
        return self.module if self.site == "output" else f"{self.module}.{self.site}"

    @property
    def site(self) -> str:
        """Name of the site among those of the host."""
        if self.side == "input":
            return "input"
        return "output" if self.rows is None else self.role

    def size(self, host: nn.Module) -> int:
        """Returns how many entries of the base's weight the place covers."""
        fan_in, out = hosts.features(host)
        taps = getattr(host, "kernel_size", ())
        rows = out if self.rows is None else sum(stop - start for start, stop in self.rows)
        return fan_in * rows * int(torch.Size(taps).numel() if taps else 1)


@dataclass(frozen=True)
class ParameterPlace:
    """One tensor of a host."""

    module: str
    parameter: str

    @property
    def key(self) -> str:
        """The tensor's absolute name."""
        return f"{self.module}.{self.parameter}" if self.module else self.parameter

    def size(self, host: nn.Module) -> int:
        """Returns the entries of the base's tensor; of a bias yet missing, its width."""
        tensor = getattr(host, self.parameter, None)
        return hosts.features(host)[1] if tensor is None else tensor.numel()


@dataclass(frozen=True)
class SublayerPlace(PlaceBeside):
    """A sublayer of a block: where it is read, and where its answer is changed."""

    site: ClassVar[str] = "sublayer"
    module: str
    """Whose output is changed."""
    name: str
    """Path of the block and the kind of sublayer in it: `encoder.layer.0.ffn`."""
    input: str
    residual: str | None = None
    norm: str | None = None
    """See `graftune.anatomy.ports.Ports`."""

    @property
    def key(self) -> str:
        """What the names of the tensors at this place begin with."""
        return f"{self.name}.adapter"


@dataclass(frozen=True)
class PositionPlace(PlaceBeside):
    """Where a body is told its tokens' positions."""

    site: ClassVar[str] = "positions"
    name = "positions"
    module: str
    """The body: takes `position_ids`."""


@dataclass(frozen=True)
class TrunkPlace(PlaceBeside):
    """Beside all blocks of a body."""

    site: ClassVar[str] = "trunk"
    name = "ladder"
    module: str
    """The body."""
    blocks: tuple[str, ...]
    """Its blocks, in order."""
    feeds_decoder: bool = False
    """Whether it is an encoder whose states a decoder attends to."""


@dataclass(frozen=True)
class InfixPlace(PlaceBeside):
    """Where a whole model is told from which token on infixes are seen."""

    site: ClassVar[str] = "infix"
    name = "infix"
    module: str = ""


Place = (
    LinearPlace
    | ParameterPlace
    | SublayerPlace
    | AttentionPlace
    | EmbeddingPlace
    | HiddenPlace
    | PositionPlace
    | TrunkPlace
    | InfixPlace
)
