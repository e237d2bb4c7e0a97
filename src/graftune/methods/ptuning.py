"""P-tuning: virtual tokens anywhere in a template, made by a small net (Liu et al. 2021).

    {h_0 .. h_i, E(x), h_i+1 .. h_m, E([MASK])}        h = MLP(biLSTM(E)), E (m, d)

The LSTM makes virtual tokens depend on each other while they train; then h alone is kept. Where
they go is one position for all texts, or wherever a marker stands in the text. E ~ N(0, 1), of
encoder="none" rows of the embedding table. Identity at init: no. Merge: no. Count: m d and the
encoder in training; m d kept. arXiv 2103.10385.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from graftune.anatomy import Anatomy
from graftune.errors import AdapterError, SettingsError
from graftune.methods._prompt_encoders import Encoder, PromptFromEncoder
from graftune.methods._soft_prompts import POSITIONS, Prompt, PromptPlace, SoftPrompt, embedded
from graftune.methods.base import register
from graftune.sites import hosts
from graftune.sites.base import Graft
from graftune.sites.placing import replace_deltas


@register
@dataclass(frozen=True, kw_only=True)
class PTuning(SoftPrompt):
    """Trains the embeddings of virtual tokens, anywhere in the text, by an LSTM or MLP.

    Merge: not possible, they stand beside the text.
    """

    name: ClassVar[str] = "PTuning"
    paper: ClassVar[str] = "Liu et al. 2021, GPT Understands, Too"
    summary: ClassVar[str] = "Virtual tokens anywhere in the text, made by an LSTM or MLP."
    default_lr: ClassVar[float] = 1e-3

    length: int = 9
    """m: virtual tokens."""
    encoder: str = "lstm"
    """What makes them in training: "lstm" (with an MLP after it), "mlp" or "none"."""
    hidden: int | None = None
    """Width of the LSTM each way (None: d/2), or between the MLP's linears (None: d)."""
    depth: int = 2
    """Layers of the LSTM, or linears of the MLP; HF PEFT's MLP has 3."""
    dropout: float = 0.0
    """Chance that an entry between the LSTM's layers is dropped in training."""
    position: str | None = None
    """Where: "front" or "after-first" (token); None is after an encoder's [CLS], else in front."""
    marker: int | None = None
    """A token id in whose places they go instead, in order: the text holds it `length` times."""

    def check(self) -> None:
        """See `Method.check`."""
        super().check()
        self._check_number("length", 1)
        self._check_choice("encoder", ("lstm", "mlp", "none"))
        if self.hidden is not None:
            self._check_number("hidden", 1)
        self._check_number("depth", 1)
        self._check_number("dropout", 0, 1, open_high=True)
        if self.position is not None:
            self._check_choice("position", POSITIONS)
        if self.marker is not None:
            self._check_number("marker", 0)
        if self.encoder == "none" and self.hidden is not None:
            raise SettingsError(f'{self.name}: hidden is {self.hidden}, but encoder is "none".')
        if self.dropout and (self.encoder != "lstm" or self.depth == 1):
            raise SettingsError(
                f"{self.name}: dropout is {self.dropout:g}, which is between an LSTM's layers, and "
                f'encoder is "{self.encoder}" with depth {self.depth}.'
            )
        if self.marker is not None and self.position is not None:
            raise SettingsError(
                f'{self.name}: position is "{self.position}" and marker is {self.marker}, and each '
                "says where virtual tokens go: give one."
            )

    def plan(self, model: nn.Module, anatomy: Anatomy, *, empty: bool = False) -> list[Graft]:
        """See `Method.plan`.

        Raises:
            SettingsError: a model without token embeddings, without room, or without the marker.
        """
        found = self._places(model, anatomy)
        return [self.placed(self._graft(place, empty), anatomy) for place in found]

    def _graft(self, found: PromptPlace, empty: bool) -> Graft:
        E = found.empty(self.length, found.width)
        if self.encoder == "none":
            start = E if empty else found.rows(found.drawn(self.length))
            return Graft(found.place, Prompt(start, found.is_after_first, self.marker))
        lstm, widths = self._sizes(found.width)
        encoder = Encoder(found.width, lstm, widths, self.dropout, hosts.delta_options(found.table))
        if not empty:
            E.normal_()
            encoder.start()
        delta = PromptFromEncoder(E, encoder, found.is_after_first, self.marker)
        return Graft(found.place, delta)

    def plan_saved(
        self, model: nn.Module, anatomy: Anatomy, tensors: Mapping[str, Tensor]
    ) -> list[Graft]:
        """See `Method.plan_saved`: once finished, a file holds the virtual tokens alone."""
        found = self._places(model, anatomy)
        if any(f"{place.place.key}.tokens" not in tensors for place in found):
            return self.plan(model, anatomy, empty=True)
        deltas = [
            Prompt(place.empty(self.length, place.width), place.is_after_first, self.marker)
            for place in found
        ]
        grafts = [Graft(at.place, delta) for at, delta in zip(found, deltas, strict=True)]
        return [self.placed(graft, anatomy) for graft in grafts]

    def count(self, model: nn.Module, anatomy: Anatomy) -> int:
        """See `Method.count`: m d and what makes them, twice where both stacks have a prompt."""
        return sum(self._count(place.width) for place in self.places(model, anatomy))

    def _count(self, d: int) -> int:
        if self.encoder == "none":
            return self.length * d
        lstm, widths = self._sizes(d)
        linears = sum(out * (fan_in + 1) for fan_in, out in itertools.pairwise(widths))
        if lstm is None:
            return self.length * d + linears
        h, layers = lstm
        inputs = d + (layers - 1) * 2 * h
        return self.length * d + 8 * h * (inputs + layers * (h + 2)) + linears

    def changes_at_the_end(self, adapter: Any) -> bool:
        """See `Method.changes_at_the_end`: where an encoder makes the virtual tokens."""
        return any(isinstance(graft.delta, PromptFromEncoder) for graft in embedded(adapter))

    def finish(self, adapter: Any) -> None:
        """See `Method.finish`: keeps the virtual tokens and drops what made them."""
        for graft in embedded(adapter):
            old = graft.delta
            if isinstance(old, PromptFromEncoder):
                new = old.kept().requires_grad_(old.E.requires_grad)
                new.stays = old.stays
                replace_deltas(adapter.model, adapter.grafts, {old: new})

    def start_from(self, adapter: Any, source: Any, task: int | str | None = None) -> None:
        """See `Method.start_from`.

        Raises:
            AdapterError: an encoder makes the virtual tokens, so that they can't be given.
        """
        if isinstance(embedded(adapter)[0].delta, Prompt):
            super().start_from(adapter, source, task)
        elif any(isinstance(graft.delta, PromptFromEncoder) for graft in source.grafts):
            super(SoftPrompt, self).start_from(adapter, source, task)
        else:
            raise AdapterError(
                f'"{adapter.name}" can\'t start from "{source.name}": its {self.encoder} makes the '
                'virtual tokens; encoder="none" lets them be given.'
            )

    def _places(self, model: nn.Module, anatomy: Anatomy) -> list[PromptPlace]:
        position = "front" if self.marker is not None else self.position
        places = self.places(model, anatomy, position)
        for found in places:
            if self.marker is None:
                found.check_room(self.name, model, self.length)
            else:
                self._check_marker(self.marker, found, model)
        return places

    def _check_marker(self, marker: int, found: PromptPlace, model: nn.Module) -> None:
        """Raises SettingsError unless a marker is a token that texts can hold."""
        size, config = hosts.features(found.table)[0], getattr(model, "config", None)
        if marker >= size:
            raise SettingsError(
                f"{self.name}: marker is {marker}, and the model has {size} tokens: take one "
                "that texts don't hold."
            )
        if marker == getattr(config, "pad_token_id", None):
            raise SettingsError(
                f"{self.name}: marker is {marker}, which pads rows: take another token that "
                "texts don't hold."
            )

    def _sizes(self, d: int) -> tuple[tuple[int, int] | None, list[int]]:
        """Returns the LSTM's width and layers, and the widths before and after each linear."""
        if self.encoder == "lstm":
            h = self.hidden or d // 2
            return (h, self.depth), [2 * h, 2 * h, d]
        return None, [d, *[self.hidden or d] * (self.depth - 1), d]
