"""FISH mask: the entries that Fisher information says matter most are trained (Sung et al. 2021).

    F_i = mean_j (d log p(y_j | x_j) / d theta_i)^2         one gradient per example j
    theta'[top] = theta[top] + values                       top: the largest F_i, over the model

The values start at 0. Identity at init: yes, bit for bit. Merge: theta'. Count: floor(keep *
entries).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from graftune.anatomy import Anatomy, resolve_tensors
from graftune.errors import SettingsError
from graftune.methods._batches import batches, evaluating
from graftune.methods._fisher import rows_of, squared_gradients
from graftune.methods._sparse import (
    budget,
    check_budget,
    largest,
    saved_sparse,
    sparse_grafts,
    spread,
)
from graftune.methods.base import Method, register
from graftune.sites.base import Graft


@register
@dataclass(frozen=True, kw_only=True)
class FishMask(Method):
    """Trains the entries of the model with the largest Fisher information on the data.

    Merge: the values are added to the base's tensors.
    """

    name: ClassVar[str] = "FishMask"
    paper: ClassVar[str] = "Sung et al. 2021, Training Neural Networks with Fixed Sparse Masks"
    summary: ClassVar[str] = "The entries with the largest Fisher information are trained."
    default_lr: ClassVar[float] = 1e-3
    mixes_rows: ClassVar[bool] = False

    keep: float = 0.005
    """Share of all entries of the chosen tensors that are trained."""
    samples: int = 1024
    """Examples whose gradients are taken, the first of the data."""
    fisher: str = "empirical"
    """Labels: "empirical", the data's; "sampled", drawn from the model (of classifiers alone)."""
    targets: str | tuple[str, ...] = "all"
    """Tensors to choose from: words, names or one regular expression; "all" is all but heads."""
    layers: int | str | tuple[int, ...] | None = None
    """Blocks to stay in; None for all, and the tensors outside blocks."""
    exclude: str | tuple[str, ...] = ()
    """Tensors to leave out again, written like `targets`."""

    def check(self) -> None:
        """See `Method.check`."""
        self._check_number("keep", 0.0, 1.0)
        if not self.keep:
            raise SettingsError(f"{self.name}: keep is {self.keep!r}, expected more than 0.")
        self._check_number("samples", 1)
        self._check_choice("fisher", ("empirical", "sampled"))

    @property
    def needs_data(self) -> bool:
        """Whether it looks at data: always, for the Fisher information."""
        return True

    def plan(self, model: nn.Module, anatomy: Anatomy, *, empty: bool = False) -> list[Graft]:
        """Returns entries spread evenly, as many as data would choose: for counting."""
        tensors = self._tensors(model, anatomy)
        sizes = [tensor.numel() for tensor in tensors.values()]
        count = check_budget(self.name, self.keep, sum(sizes))
        return _grafts(model, list(tensors), spread(sizes, count))

    def plan_on(
        self, model: nn.Module, anatomy: Anatomy, data: Iterable[Mapping[str, Tensor]]
    ) -> tuple[Method, list[Graft]]:
        """See `Method.plan_on`.

        Raises:
            SettingsError: the model returns no loss, or a gradient that isn't finite.
        """
        tensors = self._tensors(model, anatomy)
        count = check_budget(self.name, self.keep, sum(t.numel() for t in tensors.values()))
        with evaluating(model):
            examples = islice(self._examples(model, data), self.samples)
            found = squared_gradients(self.name, model, list(tensors.values()), examples)
        return self, _grafts(model, list(tensors), largest(lambda: found, count))

    def plan_saved(
        self, model: nn.Module, anatomy: Anatomy, tensors: Mapping[str, Tensor]
    ) -> list[Graft]:
        """See `Method.plan_saved`."""
        return saved_sparse(model, self._tensors(model, anatomy), tensors)

    def count(self, model: nn.Module, anatomy: Anatomy) -> int:
        """See `Method.count`: floor(keep * entries)."""
        return budget(self.keep, sum(t.numel() for t in self._tensors(model, anatomy).values()))

    def _tensors(self, model: nn.Module, anatomy: Anatomy) -> dict[str, nn.Parameter]:
        names = resolve_tensors(model, anatomy, self.targets, self.layers, self.exclude)
        return {name: model.get_parameter(name) for name in names}

    def _examples(
        self, model: nn.Module, data: Iterable[Mapping[str, Tensor]]
    ) -> Iterator[dict[str, Any]]:
        for batch in batches(model, data, self.name):
            for example in rows_of(batch):
                if self.fisher == "sampled":
                    example["labels"] = self._drawn(model, example)
                yield example

    def _drawn(self, model: nn.Module, example: dict[str, Any]) -> Tensor:
        """Returns a label drawn from the model's own distribution."""
        labels: Any = example.get("labels")
        with torch.no_grad():
            logits: Any = getattr(model(**example), "logits", None)
        known = isinstance(logits, Tensor) and isinstance(labels, Tensor)
        if not known or logits.ndim != 2 or labels.shape != logits.shape[:1]:
            shape = tuple(labels.shape[1:]) if isinstance(labels, Tensor) else labels
            raise SettingsError(
                f'{self.name}: fisher="sampled" needs a classifier with one label per row, found '
                f'labels of shape {shape} per row; take "empirical".'
            )
        return torch.multinomial(logits.float().softmax(-1), 1).flatten().to(labels.dtype)


def _grafts(model: nn.Module, names: list[str], positions: list[Tensor]) -> list[Graft]:
    """Returns changes of the tensors that have entries to train."""
    pairs = zip(names, positions, strict=True)
    return sparse_grafts(model, {name: at for name, at in pairs if len(at)})
