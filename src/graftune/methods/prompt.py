"""Prompt tuning: m trained embeddings among those of the text (Lester et al. 2021).

    [P ; E(x)]          P (m, d); the model reads it like m more tokens, at the input alone

init: rows of the embedding table drawn from its first 5000 ("vocabulary"), those of given tokens
("text", "class_labels"), or U(-0.5, 0.5) ("random"). Identity at init: no, attention is shared
with it. Merge: no. Count: m d. arXiv 2104.08691.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from graftune.anatomy import Anatomy
from graftune.errors import SettingsError
from graftune.methods.base import Method, register
from graftune.sites import hosts
from graftune.sites.base import EmbeddingDelta, Graft
from graftune.sites.embedding import PositionTable, entrance

FREQUENT = 5000
"""Rows of the embedding table that "vocabulary" draws from: tokenizers put frequent ones first."""


class Prompt(EmbeddingDelta):
    """P itself. Shapes: tokens (m, d)."""

    tokens: nn.Parameter

    def __init__(self, tokens: Tensor, is_after_first: bool) -> None:
        super().__init__()
        self.tokens, self.is_after_first = nn.Parameter(tokens), is_after_first

    def prompt(self) -> Tensor:
        """See `EmbeddingDelta.prompt`."""
        return self.tokens


@register
@dataclass(frozen=True, kw_only=True)
class PromptTuning(Method):
    """Trains the embeddings of virtual tokens that the model reads before, or among, the text.

    Merge: not possible, they stand beside the text.
    """

    name: ClassVar[str] = "PromptTuning"
    paper: ClassVar[str] = (
        "Lester et al. 2021, The Power of Scale for Parameter-Efficient Prompt Tuning"
    )
    summary: ClassVar[str] = "Trained embeddings of virtual tokens before the text."
    default_lr: ClassVar[float] = 3e-2

    length: int = 20
    """m: virtual tokens."""
    init: str = "vocabulary"
    """Initial values: "vocabulary", "random", or of init_tokens: "text", "class_labels"."""
    init_tokens: tuple[int, ...] | None = None
    """Token ids: "text" repeats or cuts them to the length, "class_labels" draws the rest."""
    position: str | None = None
    """Where: "front" or "after-first" (token); None is after an encoder's [CLS], else in front."""

    def check(self) -> None:
        """See `Method.check`."""
        self._check_number("length", 1)
        self._check_choice("init", ("vocabulary", "random", "text", "class_labels"))
        if self.position is not None:
            self._check_choice("position", ("front", "after-first"))
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
        place = entrance(self.name, model, anatomy)
        body: Any = model.get_submodule(place.module)
        table: nn.Module = body.get_input_embeddings()
        limit = PositionTable.of(body).limit
        if limit is not None and self.length >= limit:
            raise SettingsError(
                f"{self.name}: length is {self.length}, which leaves no room for text in the "
                f"{limit} positions of this {type(model).__name__}."
            )
        after = self.position == "after-first"
        if self.position is None:
            after = place.reader is None and anatomy.stacks[0].kind == "encoder"
        start = torch.empty(self.length, hosts.features(table)[1], **hosts.delta_options(table))
        if not empty:
            start = self._start(table, start)
        return [Graft(place, Prompt(start, after))]

    def count(self, model: nn.Module, anatomy: Anatomy) -> int:
        """See `Method.count`: m d."""
        body: Any = model.get_submodule(entrance(self.name, model, anatomy).module)
        return self.length * hosts.features(body.get_input_embeddings())[1]

    def _start(self, table: nn.Module, empty: Tensor) -> Tensor:
        """Returns initial values, of the shape and type of `empty`, in the units that E(x) has."""
        if self.init == "random":
            return empty.uniform_(-0.5, 0.5)
        size = hosts.features(table)[0]
        given = list(self.init_tokens or ())
        if given and max(given) >= size:
            raise SettingsError(
                f"{self.name}: init_tokens holds {max(given)}, and the model has {size} tokens."
            )
        if self.init == "text":
            given = given * -(-self.length // len(given))
        drawn = torch.randint(min(FREQUENT, size), (self.length,), device="cpu").tolist()
        chosen = [*given, *drawn[len(given) :]][: self.length]
        ids = torch.tensor(chosen, device=empty.device)
        with torch.no_grad():
            return table.forward(ids).to(empty, copy=True)  # past hooks: the base's own rows
