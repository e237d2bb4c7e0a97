"""Prompt tuning: m trained embeddings among those of the text (Lester et al. 2021).

    [P ; E(x)]          P (m, d); the model reads it like m more tokens, at the input alone

init: rows of the embedding table drawn from its first 5000 ("vocabulary"), those of given tokens
("text", "class_labels"), or U(-0.5, 0.5) ("random"). Identity at init: no, attention is shared
with it. Merge: no. Count: m d. arXiv 2104.08691.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from graftune.anatomy import Anatomy, Stack, table
from graftune.errors import SettingsError
from graftune.methods._soft_prompts import POSITIONS, Prompt, PromptPlace, SoftPrompt
from graftune.methods.base import register
from graftune.sites import hosts
from graftune.sites.base import EmbeddingDelta, Graft
from graftune.sites.entrance import check_where
from graftune.sites.hidden_prompt import hidden_entrance


@register
@dataclass(frozen=True, kw_only=True)
class PromptTuning(SoftPrompt):
    """Trains the embeddings of virtual tokens that the model reads before, or among, the text.

    Merge: not possible, they stand beside the text.
    """

    name: ClassVar[str] = "PromptTuning"
    paper: ClassVar[str] = (
        "Lester et al. 2021, The Power of Scale for Parameter-Efficient Prompt Tuning"
    )
    summary: ClassVar[str] = "Trained embeddings of virtual tokens before the text."
    default_lr: ClassVar[float] = 3e-2
    enters_blocks: ClassVar[bool] = True
    """Whether its virtual tokens may enter behind the embedding layer."""

    length: int = 20
    """m: virtual tokens."""
    init: str = "vocabulary"
    """Initial values: "vocabulary", "random", or of init_tokens: "text", "class_labels"."""
    init_tokens: tuple[int, ...] | None = None
    """Token ids: "text" repeats or cuts them to the length, "class_labels" draws the rest."""
    position: str | None = None
    """Where: "front" or "after-first" (token); None is after an encoder's [CLS], else in front."""
    enters: str | None = None
    """At the "tokens", or behind the embedding layer, at the "blocks"; None is "blocks" for images
    alone. There "vocabulary" is "random" if there is no vocabulary."""

    def check(self) -> None:
        """See `Method.check`."""
        super().check()
        self._check_number("length", 1)
        self._check_choice("init", ("vocabulary", "random", "text", "class_labels"))
        if self.position is not None:
            self._check_choice("position", POSITIONS)
        if self.enters is not None:
            self._check_choice("enters", ("tokens", "blocks"))
        if self.enters == "blocks" and not self.enters_blocks:
            raise SettingsError(f'{self.name}: enters="blocks" is for PromptTuning alone.')
        wants = self.init in ("text", "class_labels")
        if wants != bool(self.init_tokens):
            raise SettingsError(
                f'{self.name}: init_tokens is {self.init_tokens!r} with init="{self.init}", '
                + ("expected a list of token ids." if wants else 'which goes with "text" alone.')
            )
        if any(token < 0 for token in self.init_tokens or ()):
            raise SettingsError(f"{self.name}: init_tokens holds {min(self.init_tokens or ())}.")

    def plan(self, model: nn.Module, anatomy: Anatomy, *, empty: bool = False) -> list[Graft]:
        """See `Method.plan`.

        Raises:
            SettingsError: a model without token embeddings, or with too few positions or tokens.
        """
        if self._is_hidden(anatomy):
            return [self.placed(self._hidden(model, anatomy, empty), anatomy)]
        found = self.places(model, anatomy, self.position)
        for place in found:
            place.check_room(self.name, model, self.length)
        return [self.placed(self._graft(place, empty), anatomy) for place in found]

    def count(self, model: nn.Module, anatomy: Anatomy) -> int:
        """See `Method.count`: m d, twice where both stacks have a prompt."""
        if self._is_hidden(anatomy):
            return self.length * self._stack(anatomy).blocks[0].width
        return sum(self.length * place.width for place in self.places(model, anatomy))

    def _graft(self, found: PromptPlace, empty: bool) -> Graft:
        start = found.empty(self.length, found.width)
        if not empty:
            start = self._start(found, start)
        return Graft(found.place, self._delta(start, found.is_after_first, empty))

    def _is_hidden(self, anatomy: Anatomy) -> bool:
        if not self.enters_blocks:
            return False
        if self.enters is None:
            is_known = anatomy.model_type in table.HIDDEN_PROMPTS
            return is_known and self._stack(anatomy).kind == "vision"
        return self.enters == "blocks"

    def _stack(self, anatomy: Anatomy) -> Stack:
        """Returns the stack that `where` names, or the first."""
        found = (stack for stack in anatomy.stacks if stack.kind == self.where)
        return next(found, anatomy.stacks[0])

    def _hidden(self, model: nn.Module, anatomy: Anatomy, empty: bool) -> Graft:
        """Returns the graft behind the embedding layer."""
        stack = self._stack(anatomy)
        check_where(self.name, model, anatomy, self.where)
        place = hidden_entrance(self.name, model, anatomy, stack)
        host = model.get_submodule(place.embeddings)
        start = torch.empty(self.length, stack.blocks[0].width, **hosts.delta_options(host))
        is_image = stack.kind == "vision"
        if not empty and not is_image:
            [found] = self.places(model, anatomy, self.position)
            start = self._start(found, start)
        elif not empty:
            start.uniform_(-0.5, 0.5)
            if self.init_tokens:
                raise SettingsError(f"{self.name}: images have no tokens to start from.")
        is_before = self.position == "front" and (self.stays or not is_image)
        return Graft(place, self._delta(start, not is_before, empty))  # patches have no order

    def _delta(self, tokens: Tensor, is_after_first: bool, empty: bool) -> EmbeddingDelta:
        return Prompt(tokens, is_after_first)

    def _start(self, found: PromptPlace, empty: Tensor) -> Tensor:
        """Returns initial values, of the shape and type of `empty`, in the units that E(x) has."""
        if self.init == "random":
            return empty.uniform_(-0.5, 0.5)
        size = hosts.features(found.table)[0]
        given = list(self.init_tokens or ())
        if given and max(given) >= size:
            raise SettingsError(
                f"{self.name}: init_tokens holds {max(given)}, and the model has {size} tokens."
            )
        if self.init == "text":
            given = given * -(-self.length // len(given))
        drawn = found.drawn(self.length)
        return found.rows([*given, *drawn[len(given) :]][: self.length])
