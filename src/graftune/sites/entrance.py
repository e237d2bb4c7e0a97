"""Where virtual tokens enter a model: the module that takes ids, and what it knows of positions."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from typing import Any

from torch import nn

from graftune.anatomy import Anatomy
from graftune.anatomy.modules import leaf, parent
from graftune.errors import SettingsError
from graftune.sites.base import EmbeddingPlace, HiddenPlace, base_modules

_POSITIONS = re.compile(r"position_?embeddings?|embed_positions|wpe")


@dataclass(frozen=True)
class PositionTable:
    """A body's table of learned positions, as far as prompts go.

    Attributes:
        limit: the longest sequence, None without a table.
        padding: the position of padding, where the body counts only what isn't padding.
        is_from_mask: whether it counts positions in the mask by itself (OPT).
    """

    limit: int | None = None
    padding: int | None = None
    is_from_mask: bool = False

    @classmethod
    def of(cls, body: nn.Module) -> PositionTable:
        """Returns that of a body."""
        tables = (m for p, m in base_modules(body).items() if _POSITIONS.fullmatch(leaf(p)))
        table: Any = next((m for m in tables if isinstance(m, nn.Embedding)), None)
        if table is None:
            return cls()
        padding = getattr(table, "padding_idx", None)
        first = getattr(table, "offset", 0) if padding is None else padding + 1
        reads = inspect.signature(table.forward).parameters
        return cls(table.num_embeddings - first, padding, "attention_mask" in reads)


def entrance(method: str, model: nn.Module, anatomy: Anatomy) -> EmbeddingPlace:
    """Returns where a model's prompt goes: of an encoder-decoder, into the encoder.

    Raises:
        SettingsError: no module of it takes embeddings in place of ids.
    """
    stacks = anatomy.stacks
    is_text = bool(stacks) and all(stack.kind in ("encoder", "decoder") for stack in stacks)
    wanted = {"input_ids", "inputs_embeds"}
    body = above(model, stacks[0].blocks[0].path, wanted) if is_text else None
    if body is None:
        raise SettingsError(
            f"{method}: no module of this {type(model).__name__} takes embeddings in place of "
            "token ids (inputs_embeds), so it can't be given virtual tokens."
        )
    if len(stacks) == 1:
        return EmbeddingPlace(body)
    return EmbeddingPlace(
        body, above(model, stacks[1].blocks[0].path, {"encoder_hidden_states", "inputs_embeds"})
    )


def takes_any_length(model: nn.Module, place: EmbeddingPlace | HiddenPlace) -> bool:
    """Whether rows of a batch may have prompts of different lengths, or none."""
    if isinstance(place, HiddenPlace):
        return False
    body = model.get_submodule(place.module)
    reads = inspect.signature(body.forward).parameters
    return "position_ids" in reads or PositionTable.of(body).limit is None


def above(model: nn.Module, path: str, wanted: set[str]) -> str | None:
    """Returns the nearest module around `path` whose forward takes what is wanted."""
    while path:
        path = parent(path)
        if wanted <= set(inspect.signature(model.get_submodule(path).forward).parameters):
            return path
    return None
