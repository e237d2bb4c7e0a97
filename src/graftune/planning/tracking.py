"""Which storages are alive when, and what each is for: the memory of a step without the memory.

A `Ledger` watches every operation that torch dispatches. A storage enters its book with the
operation that makes it and leaves when the last tensor over it goes, which autograd decides as it
would in earnest: what a kernel saves, what checkpointing drops and what a cut backward pass never
keeps are seen, not computed by a formula.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from graftune.planning.values import Values

WEIGHTS, ADAPTER, GRADIENTS, OPTIMIZER = "weights", "adapter", "gradients", "optimizer"
ACTIVATIONS, LOGITS, WORKSPACE, BATCH = "activations", "logits", "workspace", "batch"
PARTS = (WEIGHTS, ADAPTER, GRADIENTS, OPTIMIZER, ACTIVATIONS, LOGITS, BATCH, WORKSPACE)
"""What memory is for, in the order in which it is shown."""

FORWARD = "forward"
_NO_MEMORY = frozenset({"prim::device", "aten::detach", "aten::view", "aten::t", "aten::expand"})


class Storage:
    """One storage in the book: its bytes, what it is for, and whether it lies on the host."""

    __slots__ = ("born", "is_host", "nbytes", "part", "survives", "width")

    def __init__(self, nbytes: int, part: str | None, born: str, width: int) -> None:
        self.nbytes, self.part, self.born, self.width = nbytes, part, born, width
        self.is_host = False
        self.survives = False
        """Whether the forward pass left it for the backward pass."""

    def purpose(self, vocabulary: int | None) -> str:
        """Returns what it was for, now that the step is over."""
        if self.part is not None:
            return self.part
        if vocabulary is not None and self.width == vocabulary:
            return LOGITS
        return ACTIVATIONS if self.survives else WORKSPACE


class Ledger(TorchDispatchMode):
    """Books what is made and freed while it is entered, and counts the arithmetic.

    Args:
        vocabulary: width of logits, which are told from other activations by it.
        grain: bytes that an allocator rounds up to.
    """

    def __init__(self, vocabulary: int | None = None, grain: int = 64) -> None:
        super().__init__()
        self.vocabulary, self.grain = vocabulary, grain
        self.phase = FORWARD
        self.part: str | None = None
        """What everything made from now on is for; None: told by its life."""
        self.values = Values()
        self.flops = 0
        self.traffic = 0
        """Bytes read and written by what isn't a product of matrices."""
        self._book: dict[int, tuple[weakref.ref[Any], Storage]] = {}
        self._events: list[tuple[int, Storage]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation, and books the storages that it made."""
        if func is torch.ops.aten._local_scalar_dense.default:
            return self.values.scalar(args[0])
        try:
            out = func(*args, **(kwargs or {}))
        except DynamicOutputShapeException:
            out = self.values.shaped(func, args, kwargs or {})
            if out is None:
                raise
        self.values.follow(func, args, kwargs or {}, out)
        made = [one for one in tree_iter(out) if isinstance(one, Tensor)]
        for tensor in made:
            self.note(tensor)
        self._count(func, args, kwargs or {}, out, made)
        return out

    def note(self, tensor: Tensor, part: str | None = None) -> Storage:
        """Returns a tensor's storage in the book, entered if it is new."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._book:
            found = self._book[key][1]
        else:
            size = -(-storage.nbytes() // self.grain) * self.grain
            width = tensor.shape[-1] if tensor.ndim > 1 else 0
            found = Storage(size, self.part, self.phase, width)
            gone = weakref.ref(storage, lambda _, key=key: self._freed(key))
            self._book[key] = (gone, found)
            self._events.append((1, found))
        if part is not None:
            found.part = part
        return found

    def move_to_host(self, tensor: Tensor) -> None:
        """Says that a tensor lies in the host's memory, though its device reads otherwise."""
        self.note(tensor).is_host = True

    def end_forward(self) -> None:
        """Ends the forward pass: what is alive now is kept for the backward pass."""
        for _, storage in self._book.values():
            storage.survives = storage.survives or storage.part is None

    def peak(self, *, host: bool = False) -> dict[str, int]:
        """Returns bytes by part at the moment when most were alive, on the device or the host."""
        live = best = 0
        at = -1
        for index, (sign, storage) in enumerate(self._events):
            if storage.is_host == host:
                live += sign * storage.nbytes
                if live > best:
                    best, at = live, index
        parts: dict[str, int] = {str(part): 0 for part in PARTS}
        for sign, storage in self._events[: at + 1]:
            if storage.is_host == host:
                parts[storage.purpose(self.vocabulary)] += sign * storage.nbytes
        return parts

    def _freed(self, key: int) -> None:
        _, storage = self._book.pop(key)
        self._events.append((-1, storage))

    def _count(
        self, func: Any, args: Any, kwargs: Mapping[str, Any], out: Any, made: Iterable[Tensor]
    ) -> None:
        flops = flop_registry.get(func._overloadpacket)
        if flops is not None:
            self.flops += int(flops(*args, **kwargs, out_val=out))
        elif attention := _attention_flops(func, args):
            self.flops += attention
        elif func._schema.name not in _NO_MEMORY:
            read = (one for one in tree_iter(args) if isinstance(one, Tensor))
            self.traffic += sum(t.numel() * t.element_size() for t in (*read, *made))


def _attention_flops(func: Any, args: Any) -> int:
    """Returns the operations of the CPU's fused attention, which torch's own table lacks."""
    name = func._schema.name
    if not name.startswith("aten::_scaled_dot_product_flash_attention_for_cpu"):
        return 0
    backward = name.endswith("backward")
    query, key = (args[1], args[2]) if backward else (args[0], args[1])
    *rows, queries, width = query.shape
    products = 5 if backward else 2
    return products * 2 * int(torch.Size(rows).numel()) * queries * key.shape[-2] * width
