"""The method that CONTRIBUTING.md shows how to write, for the suite that every method must pass."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator
from types import ModuleType

from graftune.methods import base
from tests.project.pages import ROOT, blocks

NAME = "gain_from_contributing"


@functools.cache
def gain() -> type[base.Method]:
    """Returns the class in the page's only Python block, known by no name yet."""
    (block,) = blocks(ROOT / "CONTRIBUTING.md", "python")
    module = sys.modules[NAME] = ModuleType(NAME)
    exec(compile(block.text, NAME, "exec"), module.__dict__)
    return base._registry.pop("GainTuning")


@contextlib.contextmanager
def registered() -> Iterator[None]:
    """Lets the class be found by its name inside the block."""
    base.register(gain())
    try:
        yield
    finally:
        del base._registry["GainTuning"]
