"""Finds a model's blocks: the elements of ModuleLists that hold attention or a feed-forward."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from graftune.anatomy import names
from graftune.anatomy.modules import Tree, leaf, parent, within
from graftune.anatomy.parts import StackKind


@dataclass(frozen=True)
class Chain:
    """The blocks of one stack, by path."""

    path: str
    blocks: tuple[str, ...]


def find_chains(tree: Tree) -> list[Chain]:
    """Returns the stacks' blocks, ModuleLists of one pattern (Swin's stages) joined to one."""
    chains: dict[str, list[str]] = {}
    first: dict[str, str] = {}
    for path in _blocks(tree):
        pattern = re.sub(r"\d+", "#", parent(path))
        chains.setdefault(pattern, []).append(path)
        first.setdefault(pattern, parent(path))
    return [Chain(first[pattern], tuple(blocks)) for pattern, blocks in chains.items()]


def _blocks(tree: Tree) -> list[str]:
    elements = [path for path in tree.modules if _is_element(path, tree)]
    found: list[str] = []
    for path in elements:
        if found and within(path, found[-1]):
            continue
        below = tree.below(path)
        if type(tree.modules[path]).__name__ != "ModuleList" and any(_content(below)):
            inner = [
                other for other in below.modules if other != path and _is_element(other, below)
            ]
            if not any(all(_content(below.below(other))) for other in inner):
                found.append(path)
    return found


def _is_element(path: str, tree: Tree) -> bool:
    home = tree.modules.get(parent(path)) if path else None
    return home is not None and leaf(path).isdigit() and type(home).__name__ == "ModuleList"


def _content(tree: Tree) -> tuple[bool, bool]:
    """Returns whether the tree holds attention, and whether more linears or experts and a norm."""
    linears = [path for path in tree.linears if path != tree.root]
    homes = {parent(path) for path in linears if names.roles_of(leaf(path), names.ATTENTION)}
    others = [path for path in linears if parent(path) not in homes]
    return bool(homes), bool(tree.norms) and (len(others) >= 2 or bool(tree.experts))


def stack_kind(path: str, tree: Tree, model_type: str, config: Any) -> StackKind:
    """Returns what a stack reads and writes, from its path and the model's kind."""
    lower = path.lower()
    if any(word in lower for word in ("vision", "visual", "image")):
        return "vision"
    if "decoder" in lower or "language_model" in lower:
        return "decoder"
    if getattr(tree.model, "main_input_name", "input_ids") == "pixel_values":
        return "vision"
    if "text" in lower and hasattr(config, "vision_config"):
        return "text"
    if getattr(config, "is_encoder_decoder", False) or "audio" in lower:
        return "encoder"
    return "decoder" if _is_causal(model_type, config) else "encoder"


def _is_causal(model_type: str, config: Any) -> bool:
    from transformers.models.auto import modeling_auto as auto

    if getattr(config, "is_decoder", False):
        return True
    masked = model_type in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return model_type in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not masked
