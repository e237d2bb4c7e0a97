"""What hooks of one pass keep for each other, by the thread that runs it."""

from __future__ import annotations

import threading
from typing import Any

import torch


class Kept(dict[tuple[str, int], Any]):
    """Values on their way from one hook to another, by (name, thread); a copy starts empty."""

    def __deepcopy__(self, memo: Any) -> Kept:
        return Kept()

    def __reduce__(self) -> Any:
        return Kept, ()


def thread_id() -> int:
    """Returns what tells the calling thread from others; 0 in what is compiled."""
    return 0 if torch.compiler.is_compiling() else threading.get_ident()
