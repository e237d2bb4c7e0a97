"""The trunk cache: what lies below the lowest trained thing is computed once, not in every epoch.

    first time      row -> E -> block 1 .. block c -> h       h is kept, by the row's content
    later           row -> E ------------------------> h      blocks 1 .. c are passed over

Ladder Side-Tuning needs what leaves every block; adapters in the top blocks, and heads alone, what
leaves the last block below them. Embeddings, masks and rotations are computed as always.

Rows go by their tokens and where they stand, not by the padding around them: what is kept was
computed in the batch that had the row first, and a batch of another shape may round otherwise.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from graftune import processes
from graftune.anatomy.modules import body_around, is_in, within
from graftune.attached import Grafts, plain_model, state_of
from graftune.errors import TrainingError
from graftune.sites.base import TrunkDelta, base_modules, is_base
from graftune.sites.placing import block_of
from graftune.training.trunk_store import TrunkStore

LIMIT = 16 * 2**30
"""Bytes that a cache may take on disk, if nothing else is said."""


@dataclass(frozen=True)
class Cut:
    """What is passed over: blocks of each stack, by path, and which of their answers are kept."""

    stacks: tuple[tuple[str, ...], ...]
    keeps_all: bool
    """Whether each block's answer is kept; else the last one's."""

    @property
    def kept(self) -> tuple[tuple[str, ...], ...]:
        """Paths of the blocks whose answers are kept, of each stack."""
        return tuple(stack if self.keeps_all else stack[-1:] for stack in self.stacks)


class TrunkCache:
    """Keeps and feeds the hidden states of one model's rows.

        cache = TrunkCache(model, "cache")
        with cache.passing(batch):
            loss = model(**batch).loss

    Args:
        model: with the adapters active that will train.
        folder: where to keep them; a folder below it is of this model, cut and dtype alone.
        dtype: "exact", the model's own; or "float16", half the bytes of float32.
        limit: bytes that it may take on disk; None for no limit.
        still: keep what is below the cut from dropping out, so that it can be kept.

    Raises:
        TrainingError: what the model computes below what trains isn't the same in every epoch.
    """

    def __init__(
        self,
        model: nn.Module,
        folder: str | Path,
        dtype: str = "exact",
        limit: int | None = LIMIT,
        *,
        still: bool = False,
    ) -> None:
        if dtype not in ("exact", "float16"):
            raise TrainingError(f'trunk cache: dtype is "{dtype}", expected exact or float16.')
        self.model = plain_model(model)
        found = cut_of(self.model, still=still)
        if isinstance(found, str):
            raise TrainingError(f"No trunk cache: {found}.")
        self.cut = found
        own = next(p for p in self.model.parameters() if p.is_floating_point()).dtype
        kept = own if dtype == "exact" else torch.float16
        name = _fingerprint(self.model, found, kept)
        self.store = TrunkStore(Path(folder) / name[:16], kept, limit)
        self.rows = self.hits = 0
        self._forms: dict[str, int] = {}
        """How many values each block answers: 0 for a tensor alone. Known after the first pass."""

    def summary(self) -> str:
        """Returns a sentence that says what it saved."""
        more = f"; no more is kept, since {self.store.why_not}" if self.store.why_not else ""
        blocks = sum(map(len, self.cut.stacks))
        return (
            f"{self.hits:,} of {self.rows:,} rows were fed from the trunk cache "
            f"({self.store.bytes / 2**20:.1f} MiB), past {blocks} blocks{more}."
        )

    @contextlib.contextmanager
    def passing(self, batch: Mapping[str, Any]) -> Iterator[None]:
        """Feeds the batch's pass inside the block if every row is known; else keeps its rows."""
        masks = _masks(batch, len(self.cut.stacks))
        keys = _keys(batch, masks)
        self.rows += len(keys)
        if self._forms and all(self.store.get(key) is not None for key in keys):
            self.hits += len(keys)
            with self._fed(KeptRows(self.store, keys, masks)):
                yield
            return
        seen: dict[str, Tensor] = {}
        moving = [m for m in self._below() if m.training]
        for module in moving:
            module.training = False
        watched = self.cut.kept if self._forms else self.cut.stacks
        handles = [
            self.model.get_submodule(path).register_forward_hook(_Keeper(seen, self._forms, path))
            for stack in watched
            for path in stack
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for module in moving:
                module.training = True
        self._keep(keys, masks, seen)

    def _below(self) -> Iterator[nn.Module]:
        """Yields the modules whose dropout would change what is kept, embeddings among them."""
        inside = tuple(block.path for block in state_of(self.model).anatomy.blocks)
        for stack in self.cut.stacks:
            for path in stack:
                yield from self.model.get_submodule(path).modules()
            body = body_around(self.model, stack[0])
            for path, module in base_modules(self.model).items():
                if within(path, body) and not is_in(path, inside) and not list(module.children()):
                    yield module

    def _keep(self, keys: list[str], masks: list[Tensor | None], seen: dict[str, Tensor]) -> None:
        stacks = [torch.stack([seen[path] for path in stack], 1).cpu() for stack in self.cut.kept]
        for row, key in enumerate(keys):
            self.store.put(
                key,
                [
                    states[row] if mask is None else states[row][:, mask[row]]
                    for states, mask in zip(stacks, masks, strict=True)
                ],
            )

    @contextlib.contextmanager
    def _fed(self, rows: KeptRows) -> Iterator[None]:
        """Lets blocks below the cut answer what is kept inside the block."""
        device = next(self.model.parameters()).device
        reader, fed = Reader(rows), list[nn.Module]()
        for number, (stack, kept) in enumerate(zip(self.cut.stacks, self.cut.kept, strict=True)):
            own = next(self.model.get_submodule(stack[0]).parameters()).dtype
            for path in stack:
                block, read = self.model.get_submodule(path), None
                if path in kept:
                    read = partial(reader.read, number, kept.index(path), device, own)
                block.__dict__["forward"] = _Fed(read, self._forms[path])
                fed.append(block)
        try:
            with torch.autograd.graph.saved_tensors_hooks(reader.let_go, _read_again):
                yield
        finally:
            reader.close()
            for block in fed:
                block.__dict__.pop("forward", None)


class KeptRows(NamedTuple):
    """A batch whose rows are all kept."""

    store: TrunkStore
    keys: list[str]
    masks: list[Tensor | None]
    """Which positions of each stack are the rows' own, `(B, T)`."""

    def state(self, stack: int, at: int) -> Tensor:
        """Returns one block's answer, `(B, T, width)`; zeros stand for padding.

        Raises:
            TrainingError: a row is gone from the folder.
        """
        found = [self.store.get(key) for key in self.keys]
        own = [record[stack][at] for record in found if record is not None]
        if len(own) < len(found):
            raise TrainingError(f"Rows are gone from the trunk cache in {self.store.folder}.")
        mask = self.masks[stack]
        if mask is None:
            return torch.stack(own)
        whole = own[0].new_zeros(*mask.shape, own[0].shape[-1])
        whole[mask] = torch.cat(own)
        return whole


class Reader:
    """Reads states when blocks are asked, and again for the backward: no graph keeps them."""

    def __init__(self, rows: KeptRows) -> None:
        self.rows = rows
        self._fed: dict[int, tuple[StorageWeakRef, Callable[[], Tensor]]] = {}

    def read(self, stack: int, at: int, device: Any, dtype: torch.dtype) -> Tensor:
        """Returns one block's answer, `(B, T, width)`."""
        state = self.rows.state(stack, at).to(device, dtype)
        again = partial(self.read, stack, at, device, dtype)
        self._fed[state.data_ptr()] = StorageWeakRef(state.untyped_storage()), again
        return state

    def let_go(self, saved: Tensor) -> Any:
        """Returns what the graph keeps of a tensor: how to read it again, if it was fed."""
        fed = self._fed.get(saved.untyped_storage().data_ptr())
        if fed is None or fed[0].expired():  # another tensor lies there now
            return saved
        return partial(_formed, fed[1], saved.size(), saved.stride(), saved.storage_offset())

    def close(self) -> None:
        """Forgets what was fed; the graph knows by itself how to read it."""
        self._fed.clear()


def _formed(again: Callable[[], Tensor], *form: Any) -> Tensor:
    return again().as_strided(*form)


def _read_again(kept: Any) -> Tensor:
    """Returns a tensor that the graph kept, or kept the place of."""
    return kept if isinstance(kept, Tensor) else kept()


class _Keeper:
    """A hook that notes what a block answers, and in what form; gone when the pass is."""

    def __init__(self, seen: dict[str, Tensor], forms: dict[str, int], path: str) -> None:
        self.seen, self.forms, self.path = seen, forms, path

    def __call__(self, block: nn.Module, args: Any, output: Any) -> None:
        alone = isinstance(output, Tensor)
        self.forms[self.path] = 0 if alone else len(output)
        self.seen[self.path] = (output if alone else output[0]).detach()


class _Fed:
    """Stands for a block's forward: answers what is kept, or what it is given."""

    def __init__(self, read: Callable[[], Tensor] | None, form: int) -> None:
        self.read, self.form = read, form

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = args[0] if args else kwargs["hidden_states"]
        answer = given if self.read is None else self.read()
        return (answer, *[None] * (self.form - 1)) if self.form else answer


def cut_of(model: nn.Module, *, still: bool = False) -> Cut | str:
    """Returns what can be passed over in training, or why nothing can.

    Args:
        model: with the adapters active that will train.
        still: whether nothing below the cut is to drop out.
    """
    state: Grafts = state_of(model)
    names = [n for n in state.active.current().names if n in state.adapters]
    if not names:
        return "no adapter is active"
    sides = 0
    lowest = state.anatomy.depth
    for name in names:
        adapter = state.adapters[name]
        if adapter.method.trains_in_place:
            return f'"{name}" trains the model itself'
        for graft in adapter.grafts:
            if isinstance(graft.delta, TrunkDelta):
                sides += 1
                if graft.delta.trunk_dropout:
                    return f'"{name}" lets the trunk drop out (trunk_dropout)'
            elif not is_in(graft.place.module, adapter.head_names):
                layer = block_of(graft.place.module, state.anatomy.positions)
                if layer is None:
                    return f'"{name}" acts at {graft.place.module or "the model"}, below the blocks'
                lowest = min(lowest, layer)
    stacks = state.anatomy.stacks
    trained = _trained_below(model, [b.path for b in state.anatomy.blocks if b.position < lowest])
    if trained is not None:
        return f"{trained} trains, below the cut"
    if lowest == 0:
        return "an adapter acts in the lowest block"
    if sides:
        if lowest < state.anatomy.depth:
            return "another adapter acts in the trunk beside the side network"
        return Cut(tuple(tuple(b.path for b in stack.blocks) for stack in stacks), True)
    if len(stacks) != 1:
        return "of models with several stacks only those beside a side network are kept"
    rates = [] if still else _dropouts(model)
    if rates:
        return f"the blocks drop out in training ({', '.join(rates)}), each time otherwise"
    return Cut((tuple(b.path for b in stacks[0].blocks[:lowest]),), False)


def _trained_below(model: nn.Module, blocks: list[str]) -> str | None:
    """Returns a tensor of the base's own that trains in some blocks, or None."""
    for path in blocks:
        for name, tensor in model.get_submodule(path).named_parameters(prefix=path):
            if tensor.requires_grad and is_base(name):
                return name
    return None


def _dropouts(model: nn.Module) -> list[str]:
    """Returns the rates of dropout that a model is configured with, other than heads'."""
    config: Any = getattr(model, "config", None)
    plain: dict[str, Any] = config.to_dict() if config is not None else {}
    return [
        f"{name}={value:g}"
        for name, value in plain.items()
        if "drop" in name and isinstance(value, float) and value and "classifier" not in name
    ]


def _masks(batch: Mapping[str, Any], stacks: int) -> list[Tensor | None]:
    """Returns which positions hold a row's own tokens, `(B, T)` on the CPU; None for all.

    Args:
        batch: what the model is called with.
        stacks: of the model; a second one's tokens are those of its labels, if nothing else
            is said.
    """
    first = batch.get("attention_mask")
    found = [first if isinstance(first, Tensor) and first.ndim == 2 else None]
    if stacks == 2:
        later, labels = batch.get("decoder_attention_mask"), batch.get("labels")
        if later is None and isinstance(labels, Tensor) and labels.ndim == 2:
            later = _up_to_last(labels != -100)
        found.append(later)
    return [None if mask is None else mask.detach().cpu().bool() for mask in found]


def _up_to_last(told: Tensor) -> Tensor:
    """Returns a mask that is true up to the last true place of each row."""
    return told.flip(1).cumsum(1).flip(1) > 0


def _keys(batch: Mapping[str, Any], masks: list[Tensor | None]) -> list[str]:
    """Returns what tells each row from others: its inputs where it has tokens, and where they are.

    Labels are one of them where a decoder reads them.
    """
    rows = len(next(value for value in batch.values() if isinstance(value, Tensor)))
    reads_labels = len(masks) == 2
    read = {
        name: value.detach().cpu()
        for name, value in sorted(batch.items())
        if isinstance(value, Tensor) and value.shape[:1] == (rows,)
    }
    if not reads_labels:
        read.pop("labels", None)
    keys: list[str] = []
    for row in range(rows):
        digest = hashlib.sha256()
        for name, value in read.items():
            own, is_late = value[row], reads_labels and ("decoder" in name or name == "labels")
            mask = masks[-1 if is_late else 0]
            if mask is not None and own.ndim == 1 and len(own) == mask.shape[1]:
                own = own[mask[row]]
                if "position_ids" not in batch:
                    digest.update(str(int(mask[row].int().argmax())).encode())
            digest.update(f"{name}{tuple(own.shape)}{own.dtype}".encode())
            digest.update(_raw(own))
        keys.append(digest.hexdigest()[:32])
    return keys


def _raw(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _fingerprint(model: nn.Module, cut: Cut, dtype: torch.dtype) -> str:
    """Returns what tells a model, where it is cut and how it is kept from others."""
    config: Any = getattr(model, "config", None)
    digest = hashlib.sha256(type(model).__name__.encode())
    said = config.to_dict() if config is not None else {}
    digest.update(json.dumps(said, sort_keys=True, default=str).encode())
    digest.update(f"{cut}{dtype}{getattr(config, '_attn_implementation', '')}".encode())
    for path, module in base_modules(model).items():
        for name, tensor in module._parameters.items():
            if tensor is not None:
                digest.update(f"{path}.{name}".encode())
                digest.update(_raw(tensor))
    return digest.hexdigest()


class Trunk:
    """The trunk cache of a Trainer, while it trains."""

    def __init__(self) -> None:
        self.cache: TrunkCache | None = None
        self.summary: str | None = None

    @contextlib.contextmanager
    def kept_for(
        self,
        model: nn.Module,
        asked: str | Path | bool | None,
        output_dir: str | None,
        forward: Any = None,
    ) -> Iterator[None]:
        """Keeps a model's states inside the block; for good if a folder is asked for.

        Raises:
            TrainingError: batches aren't what the model is called with, or nothing can be kept.
        """
        if not asked:
            yield
            return
        if forward is not None:
            raise TrainingError(
                "trunk_cache goes by a batch's rows, but `forward` may call the model with others: "
                "leave out one of them."
            )
        top = Path(output_dir or ".") / "trunk_cache" if asked is True else Path(asked)
        # Each process keeps what it computed: one folder has one writer.
        folder = top / f"process-{processes.rank()}" if processes.count() > 1 else top
        self.cache = TrunkCache(model, folder, still=True)
        try:
            yield
        finally:
            self.cache.store.close()
            self.summary, self.cache = self.cache.summary(), None
        if asked is True:  # a run that was interrupted is resumed with it
            shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # the last process takes what they lay in
                top.rmdir()

    def passing(self, batch: Mapping[str, Any]) -> contextlib.AbstractContextManager[None]:
        """Returns what a pass of a batch runs in."""
        return contextlib.nullcontext() if self.cache is None else self.cache.passing(batch)
