"""A value made of a few tensors alone, kept until one of them is another or was written to.

A tensor is the same if it is that object, with that storage at that address, and no operation has
written to it since (`_version`). Writing past torch's count of writes, through `.data`, isn't seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

Pair = tuple[Tensor, Tensor]


class Remembered:
    """Two tensors made of others; a copy starts empty. It keeps none of those others alive."""

    def __init__(self) -> None:
        self._found: tuple[Any, list[_Source], Pair] | None = None

    def get(self, sources: Sequence[Tensor], settings: Any, make: Callable[[], Pair]) -> Pair:
        """Returns what `make` made of the sources as they are, which it may have done before.

        Args:
            sources: all that it depends on.
            settings: what else it depends on.
            make: makes it.
        """
        found = self._found
        if found is not None and found[0] == settings and _are_same(found[1], sources):
            return found[2]
        made = make()
        if not any(tensor.is_meta or tensor.is_inference() for tensor in sources):
            self._found = settings, [_Source(tensor) for tensor in sources], made
        return made

    def forget(self) -> None:
        """Drops it."""
        self._found = None

    def __deepcopy__(self, memo: Any) -> Remembered:
        return Remembered()

    def __reduce__(self) -> Any:
        return Remembered, ()


class _Source:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = weakref.ref(tensor)
        self.storage = StorageWeakRef(tensor.untyped_storage())
        self.version, self.address = tensor._version, tensor.data_ptr()

    def is_same(self, tensor: Tensor) -> bool:
        return (
            self.tensor() is tensor
            and self.version == tensor._version
            and self.address == tensor.data_ptr()
            and self.storage.cdata == tensor.untyped_storage()._cdata
        )


def _are_same(before: Sequence[_Source], now: Sequence[Tensor]) -> bool:
    return len(before) == len(now) and all(map(_Source.is_same, before, now))


def autocast(device: str) -> torch.dtype | None:
    """Returns the dtype that operations are cast to by themselves, None for none."""
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
