"""`graftune merge`: base and adapter as one plain checkpoint, its logits compared."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graftune.cli.inspect import adapter_folder
from graftune.cli.options import AsJson, Debug

if TYPE_CHECKING:
    from torch import Tensor

    from graftune.tasks.models import Base

PROBES = (
    "The parcel arrived on Monday, but the lid is cracked.",
    "How do I change the unit from Fahrenheit to Celsius?",
    "no",
    "It rained all night and it still says the air is dry; is the sensor broken, or is it me?",
)
"""Texts on which the merged model is compared with base and adapter."""


def merge(
    adapter: Annotated[Path, typer.Argument(help="A run's directory, or an adapter's.")],
    into: Annotated[Path, typer.Option("--into", help="The folder to write; must not exist yet.")],
    base: Annotated[
        str | None, typer.Option(help="The base model, if it isn't where the adapter says.")
    ] = None,
    tolerance: Annotated[
        float,
        typer.Option(help="Largest difference of a logit that is accepted.", min=0.0),
    ] = 1e-3,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Fold an adapter into its base: one plain checkpoint, checked.

    What is written needs no graftune: weights, configuration, tokenizer. It is loaded again before
    it is kept, and its logits are compared with those of base and adapter: a difference above
    --tolerance is refused and nothing is left behind.

    \b
    Examples:
      graftune merge runs/classification-lora --into merged
      graftune merge ./peft-adapter --base ./model --into merged --tolerance 1e-4
    """
    from graftune.cli import screen

    _check_free(into)
    folder = adapter_folder(adapter)
    difference, size = _merge(folder, into, base, tolerance)
    found = {
        "into": str(into),
        "max_logit_difference": difference,
        "tolerance": tolerance,
        "bytes": size,
    }
    if as_json:
        screen.print_json(found)
        return
    from graftune.compare.report import words

    print(f"merged into {into} ({words.size(size)})")
    print(f"largest difference of a logit: {difference:.2g} (accepted up to {tolerance:g})")


def _check_free(into: Path) -> None:
    from graftune.errors import SettingsError

    if into.exists() and (not into.is_dir() or any(into.iterdir())):
        raise SettingsError(f'--into "{into}" exists and is not empty; name a new folder.')


def _merge(folder: Path, into: Path, base: str | None, tolerance: float) -> tuple[float, int]:
    """Returns the largest difference of a logit and the bytes written."""
    import graftune as gt
    from graftune.cli.bases import load_base_of

    loaded = load_base_of(folder, base)
    gt.load(loaded.model, folder, name="merged")
    expected = logits(loaded)
    gt.merge(loaded.model, "merged")
    part = into.with_name(f".{into.name}.partial")
    shutil.rmtree(part, ignore_errors=True)
    try:
        difference = _save_checked(loaded, part, expected)
        _refuse_above(difference, tolerance)
        size = sum(file.stat().st_size for file in part.rglob("*") if file.is_file())
        if into.is_dir():
            into.rmdir()
        part.rename(into)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return difference, size


def _save_checked(loaded: Base, part: Path, expected: Tensor) -> float:
    """Saves the merged model and tokenizer, loads both again, returns the largest difference."""
    part.parent.mkdir(parents=True, exist_ok=True)
    loaded.model.save_pretrained(part)
    loaded.tokenizer.save_pretrained(part)
    again: Any = type(loaded.model).from_pretrained(part, dtype=loaded.model.dtype)
    found = logits(loaded, again.eval())
    return float((found.float() - expected.float()).abs().max())


def _refuse_above(difference: float, tolerance: float) -> None:
    from graftune.errors import TrainingError

    if not difference <= tolerance:
        raise TrainingError(
            f"the merged model's logits differ by up to {difference:.3g} from those of base and "
            f"adapter, above --tolerance {tolerance:g}; nothing was written. Load the base in "
            "float32, or accept it with a larger --tolerance."
        )


def logits(loaded: Base, model: Any = None) -> Tensor:
    """Returns a model's logits on `PROBES`, padding zeroed, (texts, ...)."""
    import torch

    model = loaded.model if model is None else model
    was_training = model.training
    batch = loaded.tokenizer(list(PROBES), return_tensors="pt", padding=True).to(model.device)
    try:
        with torch.inference_mode():
            found = model.eval()(**batch).logits
    finally:
        model.train(was_training)
    if found.dim() == 3:
        found = found * batch["attention_mask"].unsqueeze(-1)
    return found
