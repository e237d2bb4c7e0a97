"""Where virtual tokens enter a model: the module that takes ids, and what it knows of positions."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from graftune.anatomy import Anatomy, Stack, table
from graftune.anatomy.modules import leaf, parent
from graftune.errors import SettingsError
from graftune.sites.base import EmbeddingPlace, HiddenPlace, base_modules

_TEXT = ("encoder", "decoder")
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


def entrances(
    method: str, model: nn.Module, anatomy: Anatomy, where: str | None = None
) -> list[EmbeddingPlace]:
    """Returns where a model's prompts go.

    Args:
        method: whose errors they are.
        model: the base.
        anatomy: what it is made of.
        where: of an encoder-decoder, "encoder" (None), "decoder" or "both"; of CLIP, "text".

    Raises:
        SettingsError: no module there takes embeddings in place of ids, or it has no such stack.
    """
    check_where(method, model, anatomy, where)
    bodies = {stack.kind: _body(model, stack) for stack in anatomy.stacks}
    first = next(iter(bodies), "")
    if set(bodies) == {"text", "vision"} and where is None:
        raise SettingsError(
            f"{method}: this {type(model).__name__} has two towers: say which, with "
            'where="text" or, of PromptTuning, where="vision".'
        )
    kinds = ("encoder", "decoder") if where == "both" else (where or first,)
    found = [(kind, body) for kind in kinds if (body := bodies.get(kind)) is not None]
    if len(found) < len(kinds):
        raise SettingsError(
            f"{method}: no module of this {type(model).__name__} takes embeddings in place of "
            f"token ids (inputs_embeds), so it can't be given virtual tokens.{_why(model, bodies)}"
        )
    if "decoder" not in bodies or len(bodies) == 1:
        return [EmbeddingPlace(body) for _, body in found]
    readers = {"encoder": bodies["decoder"]}
    return [EmbeddingPlace(body, readers.get(kind), kind) for kind, body in found]


def check_where(method: str, model: nn.Module, anatomy: Anatomy, where: str | None) -> None:
    """Raises SettingsError unless a model of several stacks has the one that is named."""
    kinds = [stack.kind for stack in anatomy.stacks]
    named = {*kinds, "both"} if set(kinds) == {"encoder", "decoder"} else {*kinds}
    if where is not None and (len(kinds) == 1 or where not in named):
        raise SettingsError(
            f'{method}: where is "{where}", which is for encoder-decoders and CLIP\'s towers; '
            f"this {type(model).__name__} is made of {' and '.join(kinds) or 'no known stack'}."
        )


def _why(model: nn.Module, bodies: Mapping[str, str | None]) -> str:
    """Returns what more there is to say of a model that can't be given virtual tokens."""
    config: Any = getattr(model, "config", None)
    if bodies.get("decoder") is not None:
        return ' It reads sound, which has no tokens; its decoder can: where="decoder".'
    if "text" in bodies and "vision" in bodies:
        return ' PromptTuning can be put among the patches of its images: where="vision".'
    if "vision" in bodies and hasattr(config, "window_size"):
        return " Its blocks see windows of the grid of patches, where they would have no place."
    if "vision" in bodies:
        known = ", ".join(table.PATCH_PROMPTS)
        return f" PromptTuning is known to fit among patches, in models of type {known}."
    is_sound = getattr(model, "main_input_name", "") in ("input_features", "input_values")
    return " It reads sound, which has no tokens." if is_sound else ""


def _body(model: nn.Module, stack: Stack) -> str | None:
    """Returns the module around a stack that takes tokens or their embeddings, None for none."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if stack.kind != "vision" and kind in table.TEXT_TOWERS:
        return above(model, stack.blocks[0].path, {"input_ids"})
    wanted = {"input_ids", "inputs_embeds"}
    return above(model, stack.blocks[0].path, wanted) if stack.kind in _TEXT else None


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
