"""The base model an adapter belongs to: what identifies it, and what differs between two."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from graftune.anatomy.modules import is_in
from graftune.anatomy.packed import form_of, is_packed
from graftune.errors import BaseMismatchError
from graftune.sites.base import base_modules

_SIZES = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size")
_PROBES = 4
_PROBED_VALUES = 64


def fingerprint(
    model: nn.Module, skip: Iterable[str] = (), *, changed: bool = False
) -> dict[str, Any]:
    """Returns class, name, sizes and a cheap checksum of a model's weights.

    The checksum reads the first values of the first matrix and of a few others spread over the
    model, so that it costs the same for 70 billion parameters as for ten thousand.

    Args:
        skip: names of modules whose values belong to adapters (newly initialised heads).
        changed: the weights aren't the base's own any more, so that no checksum of them is told.
    """
    config = getattr(model, "config", None)
    sizes = {key: getattr(config, key, None) for key in _SIZES}
    form = form_of(base_tensors(model).values())
    return {
        "class": type(model).__name__,
        "name": base_name(model),
        "sizes": {key: value for key, value in sizes.items() if isinstance(value, int | str)},
        "weights": None if changed else _checksum(model, tuple(skip)),
        **({} if form is None else {"quantised": form}),
    }


def base_name(model: nn.Module) -> str:
    """Returns the name or folder a model was loaded from, or ''."""
    config = getattr(model, "config", None)
    return str(getattr(config, "_name_or_path", "") or getattr(model, "name_or_path", "") or "")


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Returns the base's own tensors by name, a tied one under each of its names."""
    return {
        f"{path}.{name}" if path else name: tensor
        for path, module in base_modules(model).items()
        for name, tensor in module._parameters.items()
        if tensor is not None
    }


def check(model: nn.Module, saved: dict[str, Any], where: str, skip: Iterable[str] = ()) -> None:
    """Compares a model with the fingerprint an adapter was saved with.

    A base that is quantised otherwise than the adapter's was is warned of: its answers differ.

    Raises:
        BaseMismatchError: class, sizes or weights differ; the message names both models.
    """
    found = fingerprint(model, skip)
    ours = f"{found['class']}{_quoted(found['name'])}"
    theirs = _named(saved)
    check_sizes(getattr(model, "config", None), saved, where, ours)
    was, now = (str(one.get("quantised", "no quantisation")) for one in (saved, found))
    if was != now:
        warnings.warn(
            f"{where} was trained over {theirs} with {was}, and this base has {now}: it acts, and "
            "its answers differ from those it was trained for.",
            stacklevel=3,
        )
    if (
        None not in (saved.get("weights"), found["weights"])
        and saved["weights"] != found["weights"]
    ):
        raise BaseMismatchError(
            f"{where} was made for {theirs} with other weights than this {ours}: the sizes agree, "
            "the values don't. Load the base model it names, or pass check_base=False if you know "
            "that they may differ (a quantised or converted copy)."
        )


def check_sizes(config: Any, saved: dict[str, Any], where: str, ours: str) -> None:
    """Compares a model's config with the fingerprint an adapter was saved with.

    Raises:
        BaseMismatchError: a size differs.
    """
    for key, value in (saved.get("sizes") or {}).items():
        other = getattr(config, key, None)
        if other != value:
            raise BaseMismatchError(
                f"{where} was made for {_named(saved)} with {key} {value}; this model is {ours} "
                f"with {key} {other}."
            )


def _named(saved: dict[str, Any]) -> str:
    return f"{saved.get('class')}{_quoted(saved.get('name'))}"


def probed(model: nn.Module, skip: Iterable[str] = ()) -> list[str]:
    """Returns the names of the matrices whose first values the checksum reads."""
    left_out = tuple(skip)
    names = [
        name
        for name, tensor in base_tensors(model).items()
        if _dimensions(tensor) >= 2 and not is_in(name, left_out)
    ]
    return names[:: max(1, len(names) // _PROBES)][:_PROBES]


def _dimensions(tensor: Tensor) -> int:
    """Returns a tensor's dimensions; ZeRO-3 says them of what it took apart."""
    return len(getattr(tensor, "ds_shape", tensor.shape))


def _checksum(model: nn.Module, skip: tuple[str, ...]) -> str | None:
    tensors = base_tensors(model)
    matrices = [t for n, t in tensors.items() if _dimensions(t) >= 2 and not is_in(n, skip)]
    if not matrices or any(is_packed(t) or t.is_meta for t in matrices):
        return None  # quantised or without numbers: nothing to compare
    digest = hashlib.sha256()
    for name in probed(model, skip):
        digest.update(_probe(tensors[name]))
    return digest.hexdigest()[:16]


def _probe(tensor: Tensor) -> bytes:
    """Returns the tensor's first values rounded to bfloat16, so that fp32 and bf16 copies agree."""
    import torch

    values = tensor.detach().reshape(-1)[:_PROBED_VALUES].to(torch.bfloat16)
    return values.cpu().contiguous().view(torch.uint8).numpy().tobytes()


def _quoted(name: Any) -> str:
    return f' "{name}"' if name else ""


def embeddings(model: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
    """Returns the model's input and output embeddings, None for what its class doesn't name."""
    found: list[nn.Module | None] = []
    for ask in ("get_input_embeddings", "get_output_embeddings"):
        try:
            found.append(getattr(model, ask, lambda: None)())
        except NotImplementedError:  # CLIPModel has two towers, and names neither
            found.append(None)
    return found[0], found[1]
