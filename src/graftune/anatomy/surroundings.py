"""What lies around a model's blocks: embeddings, heads, norms, biases, tied tensors."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from graftune.anatomy import names, table
from graftune.anatomy.modules import (
    GRAFTS,
    Tree,
    is_convolution,
    is_embedding,
    is_in,
    is_norm,
    leaf,
    linear_shape,
    within,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TOKENS = re.compile(r"wte|shared|embed_in|(word|tok|token)_?embeddings?|embed_tokens|embedding")
_PATCHES = re.compile(r"patch_embedd?ings?|patch_embed|conv1|projection|proj")


def input_embeddings(model: PreTrainedModel, tree: Tree, blocks: list[str]) -> tuple[str, ...]:
    """Returns the token embeddings and patch convolutions that feed the stacks."""
    own = _own_input_embeddings(model, tree)
    found: list[str] = []
    for path, module in tree.modules.items():
        if is_in(path, blocks):
            continue
        is_token = is_embedding(module) and _TOKENS.fullmatch(leaf(path)) is not None
        is_patch = is_convolution(module) and _PATCHES.fullmatch(leaf(path)) is not None
        if path == own or is_token or is_patch:
            found.append(path)
    return tuple(path for path in found if not _stands_for_others(path, found, tree))


def _stands_for_others(path: str, found: list[str], tree: Tree) -> bool:
    """Whether a module only holds what others run: T5's `shared`, ViT's `patch_embeddings`."""
    others = [other for other in found if other != path]
    weight = tree.modules[path]._parameters.get("weight")
    twins = [o for o in others if tree.modules[o]._parameters.get("weight") is weight]
    is_shared = weight is not None and bool(twins) and leaf(path) == "shared"
    return is_shared or any(within(other, path) for other in others)


def _own_input_embeddings(model: PreTrainedModel, tree: Tree) -> str | None:
    try:
        return tree.path_of(model.get_input_embeddings())
    except (NotImplementedError, AttributeError):
        return None


def output_embeddings(model: PreTrainedModel, tree: Tree) -> str | None:
    """Returns the path of the language-model head's linear."""
    try:
        return tree.path_of(model.get_output_embeddings())
    except (NotImplementedError, AttributeError):
        return None


def heads(model: PreTrainedModel, tree: Tree, output: str | None) -> tuple[str, ...]:
    """Returns the modules with tensors outside the pretrained body, save a language-model head."""
    body = tree.path_of(model.base_model)
    if not body:
        return ()
    return tuple(
        path
        for path, module in tree.modules.items()
        if path
        and "." not in path
        and not within(body, path)
        and not (output and within(output, path))
        and next(module.parameters(), None) is not None
    )


def new_heads(
    model: PreTrainedModel, tree: Tree, found: tuple[str, ...], blocks: list[str], model_type: str
) -> tuple[str, ...]:
    """Returns the heads a task class adds, and what loading a checkpoint left newly initialised.

    A class made for a task has a head that pretraining didn't train, whatever checkpoint it came
    from, so that saving and loading a base doesn't change the answer.
    """
    trained = table.PRETRAINED_HEADS.get(model_type, ())
    is_task = names.TASKS.search(type(model).__name__) is not None
    new = [path for path in found if is_task and path not in trained]
    return tuple(new + _left_by_loading(tree, blocks, new))


def _left_by_loading(tree: Tree, blocks: list[str], known: list[str]) -> list[str]:
    """Returns modules outside the blocks whose tensors `from_pretrained` had to make up.

    It marks each tensor it loads with `_is_hf_initialized`; a model from a config has no marks.
    """
    tied = {name for group in tied_tensors(tree) for name in group}
    loaded, left = False, []
    for path, module in tree.modules.items():
        own = {n: p for n, p in module._parameters.items() if p is not None}
        marked = [getattr(p, "_is_hf_initialized", False) for p in own.values()]
        loaded = loaded or any(marked)
        outside = not is_in(path, [*blocks, *known])
        is_tied = any(f"{path}.{name}" in tied for name in own)
        if own and outside and not any(marked) and not is_tied and not is_embedding(module):
            left.append(path)
    return left if loaded else []


def norms(tree: Tree) -> tuple[str, ...]:
    """Returns every norm of the model."""
    return tree.norms


def biases(tree: Tree) -> tuple[str, ...]:
    """Returns the names of the biases of linears, convolutions and norms."""
    return tuple(
        f"{path}.bias"
        for path, module in tree.modules.items()
        if module._parameters.get("bias") is not None
        and (linear_shape(module) or is_convolution(module) or is_norm(module))
    )


def tied_tensors(tree: Tree) -> tuple[tuple[str, ...], ...]:
    """Returns groups of names that are one tensor."""
    groups: dict[int, list[str]] = {}
    for name, value in tree.model.named_parameters(remove_duplicate=False):
        if GRAFTS not in name.split("."):
            groups.setdefault(id(value), []).append(name)
    return tuple(tuple(group) for group in groups.values() if len(group) > 1)
