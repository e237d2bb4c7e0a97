"""Prompts of ours in AdapterHub's form; `prompt` says what that computes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from graftune.errors import FormatError
from graftune.formats.adapterhub import paths
from graftune.formats.adapterhub.prompt import POSITIONS
from graftune.methods._soft_prompts import Prompt
from graftune.methods.prompt import PromptTuning
from graftune.sites.base import HiddenPlace

if TYPE_CHECKING:
    from graftune.adapter import Adapter


def content(adapter: Adapter) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """Returns settings and tensors; None if it is no prompt.

    Raises:
        FormatError: AdapterHub can't compute it; the message says why.
    """
    method = adapter.method
    if type(method) is not PromptTuning:
        return None
    graft = next(graft for graft in adapter.grafts if isinstance(graft.delta, Prompt))
    delta = graft.delta
    assert isinstance(delta, Prompt)
    if not isinstance(graft.place, HiddenPlace):
        raise FormatError(
            f"AdapterHub's prompts enter behind the embedding layer, and this {method.name} before "
            'it (enters="blocks").'
        )
    position = "after-first" if delta.is_after_first else "front"
    if position == "front" and not method.stays:
        raise FormatError(
            "with AdapterHub's prompts in front, heads read a virtual token, and with this one "
            'the real first one: position="after-first" or stays=True.'
        )
    settings = {
        "architecture": "prompt_tuning",
        "combine": {ours: theirs for theirs, ours in POSITIONS.items()}[position],
        "init_weights_seed": None,
        "prompt_init": "random_uniform",
        "prompt_init_text": None,
        "prompt_length": method.length,
    }
    home = f"{paths.body(adapter.model)}prompt_tuning.prompt_tunings.{adapter.name}"
    return settings, {f"{home}.prompt_embedding.weight": delta.tokens.detach()}
