"""What is attached to a model, counted three ways: trained, changed when applied, rank."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from graftune.adapter import Adapter, adapters, plain_model
from graftune.anatomy.packed import elements
from graftune.sites.base import Graft


@dataclass(frozen=True)
class SiteCount:
    """The counts of one place."""

    adapter: str
    place: str
    kind: str
    trainable: int
    changed: int
    rank: int | None
    bytes: int


@dataclass(frozen=True)
class Summary:
    """Counts over all adapters of a model.

    Attributes:
        trainable: parameters that get gradients now.
        changed: entries of the base's tensors that differ when the adapters are applied.
        base: parameters of the base, tied tensors once; packed codes by the numbers they stand for.
        share: trainable over base, from 0 to 1.
        bytes: of all adapters' tensors, as they lie in files.
        sites: each place's counts, in the order attached.
    """

    trainable: int
    changed: int
    base: int
    share: float
    bytes: int
    sites: tuple[SiteCount, ...]

    def to_dict(self) -> dict[str, Any]:
        """Returns the counts as JSON-able values."""
        return asdict(self) | {"sites": [asdict(site) for site in self.sites]}

    def __str__(self) -> str:
        lines = [f"{'place':<52} {'trained':>12} {'changed':>14} {'rank':>5}"]
        lines += [
            f"{key:<52} {trained:>12,} {changed:>14,} {'' if rank is None else rank:>5}"
            for key, trained, changed, rank in _folded(self.sites)
        ]
        lines.append(
            f"trainable {self.trainable:,} of {self.base:,} ({self.share:.4%}) · "
            f"changed when applied {self.changed:,} · {self.bytes:,} bytes"
        )
        return "\n".join(lines)


def summary(model: nn.Module) -> Summary:
    """Counts what is attached to a model."""
    model = plain_model(model)
    attached = adapters(model)
    own = {id(t) for a in attached.values() for g in a.grafts for _, t in g.tensors()}
    base = sum(elements(p) for p in model.parameters() if id(p) not in own)
    sites = tuple(site for adapter in attached.values() for site in _sites(model, adapter))
    trainable = sum(elements(p) for p in model.parameters() if p.requires_grad)
    share = trainable / base if base else 0.0
    changed = sum(site.changed for site in sites)
    return Summary(trainable, changed, base, share, sum(s.bytes for s in sites), sites)


def _sites(model: nn.Module, adapter: Adapter) -> list[SiteCount]:
    if adapter.method.trains_in_place:
        return [
            SiteCount(adapter.name, name, "base", elements(p), elements(p), None, p.nbytes)
            for name, p in model.named_parameters()
        ]
    seen: set[int] = set()
    return [_count(model, adapter, graft, seen) for graft in adapter.grafts]


def _count(model: nn.Module, adapter: Adapter, graft: Graft, seen: set[int]) -> SiteCount:
    """Returns a place's counts; what several have in common counts at the first."""
    tensors = [tensor for _, tensor in graft.tensors() if id(tensor) not in seen]
    seen |= {id(tensor) for tensor in tensors}
    trained = sum(elements(t) for t in tensors if isinstance(t, nn.Parameter))
    in_head = graft.place.module.startswith(adapter.head_names) if adapter.head_names else False
    host = model.get_submodule(graft.place.module)
    changed = 0 if graft.delta.follows else graft.delta.changes(graft.place.size(host))
    kind = "head" if in_head else type(graft.delta).__name__
    size = sum(t.nbytes for t in tensors)
    return SiteCount(adapter.name, graft.place.key, kind, trained, changed, graft.delta.rank, size)


def _folded(sites: tuple[SiteCount, ...]) -> list[tuple[str, int, int, int | None]]:
    """Returns lines in which places that differ by a number alone are one."""
    lines: dict[str, list[Any]] = {}
    for site in sites:
        key = ".".join("*" if part.isdigit() else part for part in site.place.split("."))
        line = lines.setdefault(f"{site.adapter}: {key}", [0, 0, site.rank, 0])
        line[0] += site.trainable
        line[1] += site.changed
        line[3] += 1
    return [
        (f"{key} x{n}" if n > 1 else key, trained, changed, rank)
        for key, (trained, changed, rank, n) in lines.items()
    ]
