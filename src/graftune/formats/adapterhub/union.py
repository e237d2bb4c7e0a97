"""Unions by AdapterHub: several kinds in one file, such as MAM and UniPELT.

Which tensors are whose is told by what they hang below: "adapters", "loras", "prefix_tuning".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from graftune.errors import FormatError
from graftune.formats.adapterhub.base import Kind, Reading
from graftune.formats.adapterhub.kinds import kind_of
from graftune.formats.adapterhub.names import Tensors
from graftune.methods.base import Method
from graftune.methods.union import Union
from graftune.sites.base import Graft


class UnionKind(Kind):
    """See the module."""

    name = "union"
    in_every_block = False
    defaults = {"configs": []}  # noqa: RUF012

    def reads(self, settings: Mapping[str, Any]) -> bool:
        """See `Kind.reads`."""
        return settings.get("architecture") == "union"

    def checked(self, settings: Mapping[str, Any], where: str, wrote: str) -> dict[str, Any]:
        """See `Kind.checked`: also of the parts.

        Raises:
            FormatError: there are none, or two whose tensors can't be told apart.
        """
        config = super().checked(settings, where, wrote)
        parts = [(kind_of(part, where, wrote), part) for part in config["configs"]]
        holders = [kind.holder for kind, _ in parts]
        if not parts or len(set(holders)) < len(parts):
            raise FormatError(
                f"{where} is a union of {', '.join(kind.name for kind, _ in parts) or 'nothing'}, "
                "of which the tensors can't be told apart."
            )
        return config | {"configs": [kind.checked(part, where, wrote) for kind, part in parts]}

    def planned(self, reading: Reading, heads: Sequence[str]) -> tuple[Method, list[Graft]]:
        """See `Kind.planned`."""
        given = reading.folder.settings["configs"]
        kinds = [kind_of(part, reading.where, reading.folder.wrote) for part in given]
        shares = _shares(reading, [kind.holder for kind in kinds])
        methods, planned = list[Method](), list[list[Graft]]()
        for kind, config, tensors in zip(kinds, reading.config["configs"], shares, strict=True):
            own = dataclasses.replace(reading, config=config, tensors=tensors)
            method, grafts = kind.planned(own, ())
            methods.append(dataclasses.replace(method, train_head=None))
            planned.append(grafts)
        union = Union(methods=tuple(methods), train_head=tuple(heads) or False)
        return union, union.joined(planned)


def _shares(reading: Reading, holders: Sequence[str]) -> list[Tensors]:
    """Returns each part's tensors; those that are no part's go to the first, which refuses them."""

    def part(key: str) -> int:
        found = (at for at, holder in enumerate(holders) if f".{holder}." in f".{key}")
        return next(found, 0)

    tensors = reading.tensors
    shared_by = next((at for at, holder in enumerate(holders) if holder == "adapters"), 0)
    strangers: list[dict[str, Tensor]] = [{} for _ in holders]
    for key, tensor in tensors.strangers.items():
        strangers[part(key)][key] = tensor
    return [
        Tensors(
            tuple(named for named in tensors.named if part(named.key) == at),
            tensors.shared if at == shared_by else {},
            strangers[at],
        )
        for at in range(len(holders))
    ]


KIND = UnionKind()
