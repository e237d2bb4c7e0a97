"""What a pretrained model is made of: discovered once, then asked for sites.

The package can be called: `graftune.anatomy(model)` is `graftune.anatomy.anatomy(model)`, whether
the name stands for the function or for this package.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from graftune.anatomy.parts import (
    Anatomy,
    Block,
    Order,
    Projection,
    Role,
    Span,
    SpanKind,
    Stack,
    StackKind,
)

if TYPE_CHECKING:
    from graftune.anatomy.discovery import anatomy
    from graftune.anatomy.printing import render
    from graftune.anatomy.targets import resolve
    from graftune.anatomy.tensors import resolve_biases, resolve_norms, resolve_tensors

__all__ = [
    "Anatomy",
    "Block",
    "Order",
    "Projection",
    "Role",
    "Span",
    "SpanKind",
    "Stack",
    "StackKind",
    "anatomy",
    "render",
    "resolve",
    "resolve_biases",
    "resolve_norms",
    "resolve_tensors",
]

_LAZY = {
    "anatomy": "discovery",
    "render": "printing",
    "resolve": "targets",
    "resolve_biases": "tensors",
    "resolve_norms": "tensors",
    "resolve_tensors": "tensors",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)


class _Callable(ModuleType):
    """Lets the package be called as the function it is named after."""

    def __call__(self, model: Any, given: Anatomy | None = None) -> Anatomy:
        """Returns the model's anatomy; see `graftune.anatomy.discovery.anatomy`."""
        return self.anatomy(model, given)


sys.modules[__name__].__class__ = _Callable
