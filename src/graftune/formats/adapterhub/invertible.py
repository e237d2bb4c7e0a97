"""The coupling of the embeddings that AdapterHub's `seq_bn_inv` has: its NICE blocks, and ours.

AdapterHub takes the coupling back before the heads of its own `...AdapterModel` classes alone.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from torch import Tensor

from graftune.errors import FormatError
from graftune.formats.adapterhub import paths
from graftune.formats.adapterhub.base import Reading
from graftune.methods._bottleneck import SerialMethod

if TYPE_CHECKING:
    from graftune.adapter import Adapter

_NAME = re.compile(r"(.*\.)?invertible_(lang_)?adapters\.[^.]+\.([FG])\.([02])\.(weight|bias)")
_LAYERS = {"0": "down", "2": "up"}


def is_there(reading: Reading) -> bool:
    """Whether a directory has a coupling; old task adapters name one that they don't have.

    Raises:
        FormatError: it is of another form than NICE, or none is named.
    """
    named = any("invertible" in key for key in reading.tensors.strangers)
    form, _ = _said(reading)
    if not named and (form is None or reading.folder.config.get("type") == "text_task"):
        return False
    if form != "nice" or reading.config["is_parallel"]:
        what = "beside parallel bottlenecks" if reading.config["is_parallel"] else f"({form!r})"
        raise FormatError(
            f"{reading.where} has an invertible adapter {what}, expected one of the form "
            "'nice' with serial bottlenecks."
        )
    return True


def settings(reading: Reading) -> dict[str, Any]:
    """Returns our settings of a directory's coupling."""
    if not is_there(reading):
        return {}
    own_class = str(reading.folder.config.get("model_class")).endswith("AdapterModel")
    return {
        "invertible": True,
        "invertible_reduction": _said(reading)[1],
        "undo_at_head": own_class,
    }


def ours(key: str) -> str:
    """Returns our name of a tensor of the coupling; another stays as it is."""
    found = _NAME.fullmatch(key)
    if found is None:
        return key
    which, layer, end = found.group(3, 4, 5)
    return f"invertible.{which}_{_LAYERS[layer]}{'_bias' if end == 'bias' else ''}"


def written(adapter: Adapter, method: SerialMethod) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns AdapterHub's settings and tensors of an adapter's coupling.

    Raises:
        FormatError: AdapterHub wouldn't take it back where this adapter does.
    """
    if not method.invertible:
        return {}, {}
    if method.undo_at_head and adapter.anatomy.output_embeddings is not None:
        raise FormatError(
            "AdapterHub's models don't take the embeddings' coupling back before this head: "
            "undo_at_head=False."
        )
    home, found = _home(adapter), dict[str, Tensor]()
    tensors = adapter.state_dict()
    for which in "FG":
        for layer, name in _LAYERS.items():
            for end, ending in (("weight", ""), ("bias", "_bias")):
                key = f"{home}invertible_adapters.{adapter.name}.{which}.{layer}.{end}"
                found[key] = tensors[f"invertible.{which}_{name}{ending}"]
    reduction = {"inv_adapter_reduction_factor": method.invertible_reduction}
    return {"inv_adapter": "nice", **reduction}, found


def _said(reading: Reading) -> tuple[str | None, float]:
    """Returns the form and the reduction that settings name, old ones in a dictionary."""
    config, old = reading.config, reading.config["invertible_adapter"] or {}
    form = config["inv_adapter"] or old.get("block_type")
    return form, config["inv_adapter_reduction_factor"] or old.get("reduction_factor") or 2


def _home(adapter: Adapter) -> str:
    if adapter.anatomy.model_type in paths.LIKE_T5:
        return "encoder."
    return paths.body(adapter.model)
