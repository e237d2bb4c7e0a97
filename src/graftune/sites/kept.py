"""What hooks of one pass keep for each other, by the thread that runs it."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor


class Kept(dict[tuple[str, int], Any]):
    """Values on their way from one hook to another, by (name, thread); a copy starts empty."""

    def __deepcopy__(self, memo: Any) -> Kept:
        return Kept()

    def __reduce__(self) -> Any:
        return Kept, ()


def first(args: Any, kwargs: dict[str, Any]) -> Tensor:
    """Returns a module's first argument, however it was given."""
    return args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values())))


def thread_id() -> int:
    """Returns what tells the calling thread from others; 0 in what is compiled."""
    return 0 if torch.compiler.is_compiling() else threading.get_ident()
