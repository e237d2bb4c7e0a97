"""What one module is, told from its attributes: a quantised linear is a linear like any other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

GRAFTS = "deltas"
"""Name of the child that holds adapters; nothing below it belongs to the model."""


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """Returns (in_features, out_features) of anything that maps features linearly, or None.

    Conv1D, whose weight is transposed, and the linears of every quantiser answer alike.
    """
    inputs, outputs = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if type(module).__name__ == "Conv1D":
        inputs, outputs = getattr(module, "nx", None), getattr(module, "nf", None)
    if not isinstance(inputs, int) or not isinstance(outputs, int):
        return None
    return None if expert_shapes(module) else (inputs, outputs)


def expert_shapes(module: nn.Module) -> dict[str, tuple[int, int, int]]:
    """Returns the module's own 3-D parameters (experts, a, b) by name, in their order."""
    if type(module).__name__.startswith("Conv"):
        return {}
    return {
        name: (value.shape[0], value.shape[1], value.shape[2])
        for name, value in module._parameters.items()
        if value is not None and value.ndim == 3 and value.shape[0] > 1
    }


def is_norm(module: nn.Module) -> bool:
    """Whether the module normalises: a class named so that owns tensors or sizes, and no parts."""
    name = type(module).__name__
    parts = [child for child in module._modules if child != GRAFTS]
    return "Norm" in name and not parts


def is_embedding(module: nn.Module) -> bool:
    """Whether the module looks rows up by id."""
    return isinstance(getattr(module, "num_embeddings", None), int)


def is_convolution(module: nn.Module) -> bool:
    """Whether the module is a convolution (Conv1D is a linear)."""
    name = type(module).__name__
    return name.startswith("Conv") and isinstance(getattr(module, "in_channels", None), int)


def is_router(name: str, module: nn.Module) -> bool:
    """Whether a module of a mixture of experts chooses or weighs experts."""
    leaf = name.rpartition(".")[2]
    shape = linear_shape(module)
    named = "router" in name.lower() or leaf in ("gate", "shared_expert_gate", "wg", "gating")
    return named and shape is not None


def parent(path: str) -> str:
    """Returns the path of the module that holds `path`."""
    return path.rpartition(".")[0]


def leaf(path: str) -> str:
    """Returns the last part of a path."""
    return path.rpartition(".")[2]


def within(path: str, ancestor: str) -> bool:
    """Whether `path` is `ancestor` or below it."""
    return not ancestor or path == ancestor or path.startswith(ancestor + ".")


def body_around(model: nn.Module, path: str) -> str:
    """Returns the nearest module around `path` that is a model of transformers by itself."""
    path = parent(path)
    while path and not hasattr(model.get_submodule(path), "save_pretrained"):
        path = parent(path)
    return path


def is_in(path: str, modules: Iterable[str]) -> bool:
    """Whether a module or tensor is one of `modules`, or below one that isn't the root.

    >>> is_in("head.dense.weight", ["head"]), is_in("header.weight", ["head"])
    (True, False)
    """
    return any(path == module or path.startswith(f"{module}.") for module in modules)


def common(paths: list[str]) -> str:
    """Returns the path of the smallest module that holds all of `paths`.

    Example:
        >>> common(["layer.0.attn.q", "layer.0.attn.out.o"])
        'layer.0.attn'
    """
    split = [parent(path).split(".") if parent(path) else [] for path in paths]
    shared: list[str] = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


@dataclass(frozen=True)
class Tree:
    """One walk over a module, adapters left out: what it holds by absolute path, in tree order."""

    model: nn.Module
    root: str = ""
    """The module's own absolute path."""

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """Every module by path; a module with two paths has its first one."""
        return dict(_walk(self.model, self.root, set()))

    def below(self, path: str) -> Tree:
        """Returns the tree of one module in this one."""
        return Tree(self.modules[path], path)

    @cached_property
    def position(self) -> dict[str, int]:
        """Place of each path in the tree."""
        return {path: index for index, path in enumerate(self.modules)}

    @cached_property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(in_features, out_features) of every linear by path."""
        shapes = ((path, linear_shape(module)) for path, module in self.modules.items())
        return {path: shape for path, shape in shapes if shape is not None}

    @cached_property
    def norms(self) -> tuple[str, ...]:
        """Paths of all norms."""
        return tuple(path for path, module in self.modules.items() if is_norm(module))

    @cached_property
    def experts(self) -> dict[str, dict[str, tuple[int, int, int]]]:
        """3-D parameters by module path, where there are any."""
        found = ((path, expert_shapes(module)) for path, module in self.modules.items())
        return {path: shapes for path, shapes in found if shapes}

    def path_of(self, module: nn.Module | None) -> str | None:
        """Returns the path of a module, or None if it isn't in the tree."""
        matches = (path for path, other in self.modules.items() if other is module)
        return next(matches, None) if module is not None else None


def _walk(module: nn.Module, path: str, seen: set[int]) -> Iterator[tuple[str, nn.Module]]:
    if id(module) in seen:
        return
    seen.add(id(module))
    yield path, module
    for name, child in module._modules.items():
        if child is not None and name != GRAFTS:
            yield from _walk(child, f"{path}.{name}" if path else name, seen)
