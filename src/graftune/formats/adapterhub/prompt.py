"""Prompts by AdapterHub, which enter behind the embedding layer: without positions and norms.

    "prefix"             [P ; E]              heads read the first position, which is a virtual one
    "prefix_after_bos"   [E_1 ; P ; E_2 ..]   and here the real first one

The virtual tokens stay in the sequence to the end, so that the head that was trained with them sees
what it saw.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from graftune.errors import FormatError
from graftune.formats.adapterhub.base import Kind, Reading
from graftune.formats.filling import fill
from graftune.methods.base import Method
from graftune.methods.prompt import PromptTuning
from graftune.sites.base import Graft

POSITIONS = {"prefix": "front", "prefix_after_bos": "after-first"}
"""AdapterHub's names of where a prompt comes, and ours."""
_NAME = re.compile(
    r"(?:.+\.)?prompt_tuning\.prompt_tunings\.(?P<name>[^.]+)\.prompt_embedding\.weight"
)


class Prompt(Kind):
    """See the module."""

    name = "prompt tuning"
    holder = "prompt_tuning"
    in_every_block = False
    defaults = {"combine": "prefix", "prompt_length": 10}  # noqa: RUF012
    without_effect = ("init_weights_seed", "prompt_init", "prompt_init_text")

    def reads(self, settings: Mapping[str, Any]) -> bool:
        """See `Kind.reads`."""
        return settings.get("architecture") == "prompt_tuning"

    def checked(self, settings: Mapping[str, Any], where: str, wrote: str) -> dict[str, Any]:
        """See `Kind.checked`."""
        config = super().checked(settings, where, wrote)
        if config["combine"] not in POSITIONS:
            raise FormatError(
                f'{where}: combine is "{config["combine"]}", expected one of '
                f"{', '.join(POSITIONS)}."
            )
        return config

    def planned(self, reading: Reading, heads: Sequence[str]) -> tuple[Method, list[Graft]]:
        """See `Kind.planned`."""
        method = PromptTuning(
            length=reading.config["prompt_length"],
            position=POSITIONS[reading.config["combine"]],
            enters="blocks",
            stays=True,
            train_head=tuple(heads) or False,
        )
        grafts = method.plan(reading.model, reading.anatomy, empty=True)
        fill(grafts, _named(reading, grafts[0]), reading.where, reading.folder)
        return method, grafts


def _named(reading: Reading, graft: Graft) -> dict[str, Tensor]:
    """Returns a file's tensors under our names; one that means nothing stays as it is."""
    found: dict[str, Tensor] = {named.key: named.value for named in reading.tensors.named}
    for key, tensor in reading.tensors.strangers.items():
        parts = _NAME.fullmatch(key)
        own = parts is not None and parts["name"] == reading.folder.name
        found[f"{graft.place.key}.tokens" if own else key] = tensor
    return found


KIND = Prompt()
