"""What AdapterHub writes of one kind of adapter, and how it becomes ours."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import nn

from graftune.anatomy import Anatomy
from graftune.errors import FormatError, nearest
from graftune.formats.adapterhub.folder import Folder
from graftune.formats.adapterhub.names import Tensors
from graftune.methods.base import Method
from graftune.sites.base import Graft


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """A directory on its way onto a model."""

    where: str
    """The directory, for messages."""
    model: nn.Module
    anatomy: Anatomy
    folder: Folder
    config: Mapping[str, Any]
    """Its settings, checked, every key filled in."""
    tensors: Tensors

    @property
    def layers(self) -> tuple[int, ...] | None:
        """The blocks that have one, None for all."""
        out = set(self.config["leave_out"])
        every = [block.index for block in self.anatomy.blocks]
        return tuple(index for index in every if index not in out) if out & set(every) else None


class Kind:
    """One of AdapterHub's kinds of settings.

    A subclass says what its settings mean and what its tensors are called; whichever setting it
    doesn't list is refused by name, since a setting that is silently ignored gives silently wrong
    results.
    """

    name: ClassVar[str]
    """What messages call it."""
    holder: ClassVar[str] = "adapters"
    """What its tensors hang below, by which a union's are told apart."""
    defaults: ClassVar[Mapping[str, Any]] = {}
    """Settings that are followed, with what a file that lacks one means by it."""
    in_every_block: ClassVar[bool] = True
    """Whether each block has the same, but for those in `leave_out`."""
    without_effect: ClassVar[tuple[str, ...]] = ()
    """Settings that don't change what trained weights compute."""

    def reads(self, settings: Mapping[str, Any]) -> bool:
        """Whether settings are of this kind."""
        raise NotImplementedError

    def left_out(self, config: Mapping[str, Any], anatomy: Anatomy) -> tuple[int, ...]:
        """Returns the blocks that have nothing, of checked settings."""
        return tuple(config["leave_out"])

    def planned(self, reading: Reading, heads: Sequence[str]) -> tuple[Method, list[Graft]]:
        """Returns the method that a directory means, and its grafts, filled.

        Args:
            reading: the directory and the model.
            heads: the modules of which the directory has other values.

        Raises:
            FormatError: tensors are missing, unexpected, or settings can't be.
            BaseMismatchError: sizes differ.
        """
        raise NotImplementedError

    def checked(self, settings: Mapping[str, Any], where: str, wrote: str) -> dict[str, Any]:
        """Returns settings with every known key filled in.

        Raises:
            FormatError: a setting is unknown.
        """
        full = {"leave_out": [], **self.defaults}
        known = {*full, *self.without_effect, "architecture"}
        for key, value in settings.items():
            if key not in known and value not in (None, False, [], {}):
                raise FormatError(
                    f'{where}: setting "{key}" ({value!r:.60}), written by {wrote}, is unknown '
                    f"here.{nearest(key, known)}"
                )
        return full | {k: v for k, v in settings.items() if k in full and v is not None}
