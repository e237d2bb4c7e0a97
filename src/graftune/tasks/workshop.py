"""Where a run gets its data, base, tokens and head's start from: made for it alone, or kept.

A run by itself makes everything (`Source`). Runs in one process, as those of a comparison, share a
`Workshop`: what doesn't depend on their method is made once, and each gets it as if it had made it.

    data      read and split once, for each task and its settings
    base      loaded once for each seed's new head; a run gets a copy that it may change, or itself
              where it only reads (a probe, prompts), its head alone beside what another holds
    tokens    of each split once, for each base and length
    head      the linear reading that a new head starts as, once for each base (and seed, where
              more than that one layer is new)
    trunk     kept hidden states, once for each seed and batch size: in batches of another shape
              kernels round otherwise, and a run's numbers would be no longer its own
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftune.anatomy.packed import stored_bytes
from graftune.tasks.data import Example, Loaded, load
from graftune.tasks.models import Base, load_base, load_shell
from graftune.tasks.quantising import Quantising
from graftune.tasks.settings import RunSettings
from graftune.tasks.twins import body_of, share_twins

if TYPE_CHECKING:
    from torch import Tensor

    from graftune.tasks.task import Encoded, Ready, Task

Note = Callable[[str], object]
BODY = "feature"
"""What `load_base` calls a base without a head."""


class Source:
    """Makes everything for the run that asks."""

    def data(self, settings: RunSettings, task: Task) -> Loaded:
        """Returns the examples of all splits. Raises DataError."""
        return load(settings.data, task)

    def base(
        self, settings: RunSettings, task: Task, labels: list[str] | None, dtype: str, note: Note
    ) -> Base:
        """Returns a base that the run may change."""
        return load_base(
            settings.base,
            task.model_task,
            labels=labels,
            dtype=dtype,
            seed=settings.train.seed,
            quantize=Quantising.asked(settings.train),
            note=note,
        )

    def frozen(self, settings: RunSettings, kind: str, dtype: str, note: Note) -> Base:
        """Returns a base for `load_base`'s task `kind` that the run only reads."""
        quantize = Quantising.asked(settings.train)
        return load_base(settings.base, kind, dtype=dtype, quantize=quantize, note=note)

    def encoded(
        self, settings: RunSettings, task: Task, split: str, examples: Sequence[Example], to: Ready
    ) -> Encoded:
        """Returns a split as tokens."""
        return task.encode(examples, to)

    def start_head(
        self,
        settings: RunSettings,
        ready: Ready,
        fresh: Sequence[str],
        splits: Mapping[str, Sequence[Any]],
    ) -> bool:
        """Fits a new head to the base alone; returns whether it could be."""
        from graftune.tasks.head_start import start_head

        return start_head(ready, fresh, splits)

    def trunk(self, settings: RunSettings) -> Path | None:
        """Returns the folder for the trunk's states; None for one that ends with the run."""
        return None


ALONE = Source()


@dataclass(frozen=True)
class _Head:
    """A head as it starts: whether it was fitted, and its tensors."""

    is_started: bool
    tensors: dict[str, Tensor]


class Workshop(Source):
    """Makes everything once, and gives each run its own of what it may change.

    Args:
        folder: for the trunk's states; whoever made the workshop removes it.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._data: dict[str, Loaded] = {}
        self._bases: dict[str, Base] = {}
        self._new: dict[str, dict[str, Tensor]] = {}
        """The tensors that a seed draws."""
        self._kin: dict[str, list[Base]] = {}
        """All that were loaded of one checkpoint and type."""
        self.lent = 0
        """Bytes of what `frozen` gave last that were held before; whoever counts sets it to 0."""
        self._tokens: dict[str, Encoded] = {}
        self._heads: dict[str, _Head] = {}

    def data(self, settings: RunSettings, task: Task) -> Loaded:
        """See `Source.data`."""
        key = _data_key(settings)
        if key not in self._data:
            self._data[key] = load(settings.data, task)
        kept = self._data[key]
        return Loaded(dict(kept.splits), copy.deepcopy(kept.report))

    def base(
        self, settings: RunSettings, task: Task, labels: list[str] | None, dtype: str, note: Note
    ) -> Base:
        """See `Source.base`. A quantised one is loaded for each run: its codes aren't copied."""
        if Quantising.asked(settings.train) is not None:
            return super().base(settings, task, labels, dtype, note)
        key = _key(settings.base, task.model_task, labels, dtype)
        seeded = _key(key, settings.train.seed)
        if seeded not in self._new:
            made = super().base(settings, task, labels, dtype, note)
            self._new[seeded] = _tensors(made.model, made.fresh)
            if key not in self._bases:
                self._bases[key] = made
                self._kin.setdefault(_key(settings.base, dtype), []).append(made)
        kept = self._bases[key]
        model = copy.deepcopy(kept.model)
        _fill(model, self._new[seeded])
        tokenizer = copy.deepcopy(kept.tokenizer)
        return Base(
            model=model, tokenizer=tokenizer, spec=kept.spec, folder=kept.folder, fresh=kept.fresh
        )

    def frozen(self, settings: RunSettings, kind: str, dtype: str, note: Note) -> Base:
        """See `Source.frozen`. What trains gets copies, so this is the kept base itself."""
        if Quantising.asked(settings.train) is not None:
            return super().frozen(settings, kind, dtype, note)
        key = _key(settings.base, kind, None, dtype)
        kin = self._kin.setdefault(_key(settings.base, dtype), [])
        bared = kind == BODY and key not in self._bases and _bared(settings.base, kin)
        if bared:
            self._bases[key] = bared
        if key in self._bases:
            self.lent = stored_bytes(self._bases[key].model)
        else:
            self._bases[key] = super().frozen(settings, kind, dtype, note)
            for other in kin:
                share_twins(self._bases[key].model, other.model)
            kin.append(self._bases[key])
        kept = self._bases[key]
        return replace(kept, tokenizer=copy.deepcopy(kept.tokenizer))

    def encoded(
        self, settings: RunSettings, task: Task, split: str, examples: Sequence[Example], to: Ready
    ) -> Encoded:
        """See `Source.encoded`."""
        key = _key(_data_key(settings), settings.base, split, to.max_length, to.labels)
        if key not in self._tokens:
            self._tokens[key] = task.encode(examples, to)
        return self._tokens[key]

    def start_head(
        self,
        settings: RunSettings,
        ready: Ready,
        fresh: Sequence[str],
        splits: Mapping[str, Sequence[Any]],
    ) -> bool:
        """See `Source.start_head`."""
        layers = {name.rpartition(".")[0] for name in fresh}
        seed = settings.train.seed if len(layers) > 1 else None
        dtype = str(ready.model.dtype)
        key = _key(_data_key(settings), settings.base, ready.max_length, dtype, seed)
        if key not in self._heads:
            is_started = super().start_head(settings, ready, fresh, splits)
            self._heads[key] = _Head(is_started, _tensors(ready.model, fresh))
        kept = self._heads[key]
        if kept.is_started:
            _fill(ready.model, kept.tensors)
        return kept.is_started

    def trunk(self, settings: RunSettings) -> Path | None:
        """See `Source.trunk`."""
        train = settings.train
        name = f"seed{train.seed}-batch{train.batch_size}-{int(train.group_by_length)}"
        return self.folder / "trunk" / name if self.folder is not None else None


def _bared(spec: str, kin: Sequence[Base]) -> Base | None:
    """Returns the body of a base that is kept, if it is what would be loaded; None otherwise."""
    if not kin:
        return None
    names = {name: tensor.shape for name, tensor in load_shell(spec)[0].named_parameters()}
    for base in kin:
        body = body_of(base.model, names)
        if body is not None:
            return replace(base, model=body, fresh=())
    return None


def _data_key(settings: RunSettings) -> str:
    return _key(settings.task, settings.task_options, settings.data.model_dump(mode="json"))


def _key(*parts: Any) -> str:
    return json.dumps(parts, sort_keys=True, default=str)


def _tensors(model: Any, names: Sequence[str]) -> dict[str, Tensor]:
    state = model.state_dict()
    return {name: state[name].detach().clone() for name in names if name in state}


def _fill(model: Any, tensors: Mapping[str, Tensor]) -> None:
    import torch

    state = model.state_dict()
    with torch.no_grad():
        for name, tensor in tensors.items():
            state[name].copy_(tensor)
