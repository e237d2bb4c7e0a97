"""What is known of a block and its spans while they are being read."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from graftune.anatomy.modules import Tree, common, is_router, leaf, parent
from graftune.anatomy.parts import Projection, SpanKind


@dataclass
class Draft:
    """A span while its block is still being read."""

    kind: SpanKind
    core: str
    """The module that holds the projections; for attention, its inputs."""
    projections: list[Projection]
    experts: bool = False
    missing: list[str] = field(default_factory=list)

    @property
    def modules(self) -> list[str]:
        """Paths of the modules that hold the projections."""
        return [projection.module for projection in self.projections] or [f"{self.core}.none"]

    @property
    def root(self) -> str:
        """Path of the smallest module that holds all of them."""
        return common([f"{path}.weight" for path in self.modules] if self.experts else self.modules)


@dataclass(frozen=True)
class BlockView:
    """One block of a model and what its model says of it."""

    tree: Tree
    """The tree of the block alone, with absolute paths."""
    path: str
    model_type: str
    config: Any

    @cached_property
    def linears(self) -> dict[str, tuple[int, int]]:
        """The block's linears but for routers and what lies inside norms."""
        return {
            path: shape
            for path, shape in self.tree.linears.items()
            if not self._routes(path) and "norm" not in self.below(parent(path)).lower()
        }

    def below(self, path: str) -> str:
        """Returns a path relative to the block."""
        return path[len(self.path) :].lstrip(".")

    @cached_property
    def has_experts(self) -> bool:
        """Whether the block is a mixture of experts."""
        lists = (path for path in self.tree.modules if leaf(path) == "experts")
        return bool(self.tree.experts) or next(lists, None) is not None

    def _routes(self, path: str) -> bool:
        if not self.has_experts or not is_router(path, self.tree.modules[path]):
            return False
        beside = {leaf(other) for other in self.tree.linears if parent(other) == parent(path)}
        return leaf(path) != "gate" or not beside & {"up", "up_proj", "down", "down_proj"}


def named(path: str) -> str:
    """Returns the path whose last part says what a linear is for (Moshi wraps each in `linear`)."""
    return path.removesuffix(".linear") if path.endswith("proj.linear") else path
