"""The numbers that shapes depend on: ids, masks and positions keep theirs, all else has none.

Models and prompts ask masks whether they pad, or where a row ends. Whole numbers and truth values
are small, so an operation on them alone is run in earnest beside the one that stands for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

LARGEST = 2**24
"""Values of the largest tensor whose numbers are kept."""


class Values:
    """The numbers of tensors that have none of their own."""

    def __init__(self) -> None:
        self._known: Any = WeakTensorKeyDictionary()

    def scalar(self, tensor: Tensor) -> Any:
        """Returns the number that a tensor of one holds; where unknown 1.0, 0 or False.

        Fractions are counters of steps and scales of losses, truth values are flags of a method
        that was just attached.
        """
        if tensor in self._known:
            with unset_fake_temporarily():
                return self._known[tensor].item()
        if tensor.is_floating_point():
            return 1.0
        return False if tensor.dtype == torch.bool else 0

    def shaped(self, func: Any, args: Any, kwargs: Any) -> Tensor | None:
        """Returns the result of an operation whose shape its numbers decide, None if unknown."""
        read = [one for one in tree_flatten((args, kwargs))[0] if isinstance(one, FakeTensor)]
        if not read or any(one not in self._known for one in read):
            return None
        with unset_fake_temporarily(), torch.no_grad():
            given_args, given = tree_map(self._real, (args, kwargs))
            real = func(*given_args, **given)
        if not isinstance(real, Tensor):
            return None
        fake = read[0].fake_mode.from_tensor(real)
        self._known[fake] = real
        return fake

    def follow(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Runs an operation on whole numbers in earnest, where all that it reads are known."""
        results = [one for one in tree_flatten(out)[0] if isinstance(one, FakeTensor)]
        if not results or any(not _is_whole(one) for one in results):
            return
        read = [one for one in tree_flatten((args, kwargs))[0] if isinstance(one, Tensor)]
        if any(isinstance(one, FakeTensor) and one not in self._known for one in read):
            return
        with unset_fake_temporarily(), torch.no_grad():
            given_args, given = tree_map(self._real, (args, kwargs))
            real = func(*given_args, **given)
        found = [one for one in tree_flatten(real)[0] if isinstance(one, Tensor)]
        for fake, value in zip(results, found, strict=False):
            self._known[fake] = value

    def _real(self, value: Any) -> Any:
        return self._known[value] if isinstance(value, FakeTensor) else value


def _is_whole(tensor: Tensor) -> bool:
    is_exact = not tensor.is_floating_point() and not tensor.is_complex()
    return is_exact and tensor.dtype != torch.uint8 and tensor.numel() <= LARGEST
