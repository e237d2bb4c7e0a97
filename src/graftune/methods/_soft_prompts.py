"""Virtual tokens at the input: where they go in a model, and what they start from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graftune.anatomy import Anatomy
from graftune.errors import AdapterError, SettingsError
from graftune.methods.base import Method
from graftune.sites import hosts
from graftune.sites.base import EmbeddingDelta, EmbeddingPlace, Graft
from graftune.sites.entrance import PositionTable, entrances

FREQUENT = 5000
"""Rows of the embedding table that a vocabulary's are drawn from: frequent ones come first."""
POSITIONS = ("front", "after-first")
STACKS = ("encoder", "decoder", "both", "text", "vision")


class Prompt(EmbeddingDelta):
    """P itself. Shapes: tokens (m, d)."""

    tokens: nn.Parameter

    def __init__(self, tokens: Tensor, is_after_first: bool, marker: int | None = None) -> None:
        super().__init__()
        self.tokens, self.length = nn.Parameter(tokens), len(tokens)
        self.is_after_first, self.marker = is_after_first, marker

    def prompt(self, tasks: Tensor | None = None) -> Tensor:
        """See `EmbeddingDelta.prompt`."""
        return self.tokens


@dataclass(frozen=True)
class PromptPlace:
    """Where a model's virtual tokens go.

    Attributes:
        place: the site's.
        table: its token embeddings.
        is_after_first: whether they follow the first token.
    """

    place: EmbeddingPlace
    table: nn.Module
    is_after_first: bool

    @classmethod
    def all(
        cls,
        method: str,
        model: nn.Module,
        anatomy: Anatomy,
        position: str | None = "front",
        where: str | None = None,
    ) -> list[PromptPlace]:
        """Returns those of a model.

        Args:
            method: whose errors they are.
            model: the base.
            anatomy: what it is made of.
            position: one of POSITIONS; None is after an encoder's first token, else in front.
            where: one of STACKS; None is the encoder of an encoder-decoder.

        Raises:
            SettingsError: a model without token embeddings, or without such a stack.
        """
        places = entrances(method, model, anatomy, where)
        is_after_first = position == "after-first"
        if position is None:
            kinds = [stack.kind for stack in anatomy.stacks if where in (None, stack.kind)]
            is_after_first = kinds in (["text"], ["encoder"]) and places[0].stack is None
        bodies: list[Any] = [model.get_submodule(place.module) for place in places]
        return [
            cls(place, body.get_input_embeddings(), is_after_first)
            for place, body in zip(places, bodies, strict=True)
        ]

    @property
    def width(self) -> int:
        """d, of a token's embedding."""
        return hosts.features(self.table)[1]

    def empty(self, *shape: int) -> Tensor:
        """Returns an uninitialised tensor of the dtype and on the device of the adapter."""
        return torch.empty(*shape, **hosts.delta_options(self.table))

    def check_room(self, method: str, model: nn.Module, length: int) -> None:
        """Raises SettingsError if a prompt leaves a model no position for text."""
        limit = PositionTable.of(model.get_submodule(self.place.module)).limit
        if limit is not None and length >= limit:
            raise SettingsError(
                f"{method}: length is {length}, which leaves no room for text in the {limit} "
                f"positions of this {type(model).__name__}."
            )

    def drawn(self, length: int) -> list[int]:
        """Returns tokens drawn from the most frequent ones."""
        size = hosts.features(self.table)[0]
        return torch.randint(min(FREQUENT, size), (length,), device="cpu").tolist()

    def rows(self, tokens: Sequence[int]) -> Tensor:
        """Returns what the base's own table says of tokens, in the units that the model reads."""
        like = self.empty(0)
        ids = torch.tensor(tokens, device=like.device)
        with torch.no_grad():
            return self.table.forward(ids).to(like, copy=True)  # past hooks


@dataclass(frozen=True, kw_only=True)
class SoftPrompt(Method):
    """A method whose virtual tokens are embeddings: one can start from what another learned."""

    stays: bool = False
    """Leave the virtual tokens in what an encoder answers, so that a head that reads the first
    token reads a virtual one where they come in front: HF PEFT's and AdapterHub's heads do."""
    where: str | None = None
    """Of encoder-decoders: before the "encoder"'s text (None), the "decoder"'s, or "both", with
    virtual tokens of each one's own. Of CLIP's towers: the "text"'s or the
    "vision"'s."""

    def check(self) -> None:
        """See `Method.check`."""
        if self.where is not None:
            self._check_choice("where", STACKS)

    def places(
        self, model: nn.Module, anatomy: Anatomy, position: str | None = "front"
    ) -> list[PromptPlace]:
        """Returns where its virtual tokens go; see `PromptPlace.all`."""
        return PromptPlace.all(self.name, model, anatomy, position, self.where)

    def placed(self, graft: Graft, anatomy: Anatomy) -> Graft:
        """Returns a new graft, its virtual tokens staying if asked for.

        Raises:
            SettingsError: they can't stay in what a decoder answers.
        """
        assert isinstance(graft.delta, EmbeddingDelta)
        graft.delta.stays = self.stays
        kinds = [stack.kind for stack in anatomy.stacks if self.where in (None, stack.kind)]
        if self.stays and kinds not in (["encoder"], ["vision"]):
            raise SettingsError(
                f"{self.name}: stays=True is for encoders, whose heads read the first token; this "
                f"model is made of {' and '.join(f'a {kind}' for kind in kinds)}."
            )
        return graft

    @torch.no_grad()
    def prompt_of(self, adapter: Any, task: int | str | None = None) -> Tensor:
        """Returns an adapter's virtual tokens as they are, `(m, d)`; of both stacks, `(2 m, d)`.

        Args:
            adapter: of this method.
            task: whose, where the adapter has several tasks.

        Raises:
            AdapterError: a task is named, and it has none.
        """
        if task is not None:
            raise AdapterError(
                f'Adapter "{adapter.name}" is {self.name}, which has one task: leave task out.'
            )
        deltas: list[Any] = [graft.delta for graft in embedded(adapter)]
        return torch.cat([delta.prompt() for delta in deltas])

    def start_from(self, adapter: Any, source: Any, task: int | str | None = None) -> None:
        """See `Method.start_from`: takes the virtual tokens of any soft prompt.

        Raises:
            AdapterError: the source isn't one, or not of as many stacks.
        """
        tokens = prompt_of(source, task)
        check_stacks(adapter, source)
        adapter.load_state_dict(spread(adapter, tokens), strict=False)


def prompt_of(source: Any, task: int | str | None = None) -> Tensor:
    """Returns the virtual tokens of an adapter of any soft prompt; see `SoftPrompt.prompt_of`.

    Raises:
        AdapterError: it isn't one.
    """
    if not isinstance(source.method, SoftPrompt):
        raise AdapterError(
            f'Adapter "{source.name}" is {source.method.name}, which has no virtual tokens at the '
            "input to start from."
        )
    return source.method.prompt_of(source, task)


def spread(adapter: Any, tokens: Tensor) -> dict[str, Tensor]:
    """Returns virtual tokens, as `prompt_of` has them, by the names of an adapter's tensors."""
    grafts: list[Any] = embedded(adapter)
    lengths = [graft.delta.length for graft in grafts]
    parts = tokens.split(lengths) if sum(lengths) == len(tokens) else [tokens] * len(grafts)
    return {f"{g.place.key}.tokens": part for g, part in zip(grafts, parts, strict=True)}


def check_stacks(adapter: Any, source: Any) -> None:
    """Raises AdapterError unless two adapters have prompts in as many stacks."""
    counts = len(embedded(adapter)), len(embedded(source))
    if counts[0] != counts[1]:
        raise AdapterError(
            f'"{adapter.name}" can\'t start from "{source.name}": it has prompts in {counts[0]} '
            f"of the model's stacks, and its source in {counts[1]} (where=)."
        )


def embedded(adapter: Any) -> list[Graft]:
    """Returns an adapter's grafts at embedding sites, the encoder's first."""
    return [graft for graft in adapter.grafts if isinstance(graft.delta, EmbeddingDelta)]
