"""`graftune merge`: base and adapter as one plain checkpoint, its logits compared."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

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
DTYPES = ("float32", "bfloat16", "float16")


def merge(
    adapter: Annotated[Path, typer.Argument(help="A run's directory, or an adapter's.")],
    into: Annotated[Path, typer.Option("--into", help="The folder to write; must not exist yet.")],
    base: Annotated[
        str | None, typer.Option(help="The base model, if it isn't where the adapter says.")
    ] = None,
    dequantize: Annotated[
        bool,
        typer.Option("--dequantize", help="Of a quantised base: write plain weights."),
    ] = False,
    requantize: Annotated[
        bool,
        typer.Option("--requantize", help="Of a quantised base: quantise the sums; loses some."),
    ] = False,
    dtype: Annotated[
        str | None,
        typer.Option(help="Of plain weights: float32, bfloat16 or float16; else the base's."),
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

    A base that was quantised for training is loaded so again. --dequantize writes a plain
    checkpoint, which loads without its quantiser; --requantize one that is quantised as it was,
    whose logits differ by far more than the default tolerance.

    \b
    Examples:
      graftune merge runs/classification-lora --into merged
      graftune merge ./peft-adapter --base ./model --into merged --tolerance 1e-4
      graftune merge runs/instruct-lora --into merged --dequantize
    """
    from graftune.cli import screen

    _check_free(into)
    form = Form.of(dequantize, requantize, dtype)
    folder = adapter_folder(adapter)
    difference, size = _merge(folder, into, base, form, tolerance)
    found = {
        "into": str(into),
        "max_logit_difference": difference.logit,
        "max_probability_difference": difference.probability,
        "tolerance": tolerance,
        "bytes": size,
    }
    if as_json:
        screen.print_json(found)
        return
    from graftune.compare.report import words

    print(f"merged into {into} ({words.size(size)})")
    print(
        f"largest difference of a logit: {difference.logit:.2g} (accepted up to {tolerance:g}), "
        f"of a probability: {difference.probability:.2g}"
    )


def _check_free(into: Path) -> None:
    from graftune.errors import SettingsError

    if into.exists() and (not into.is_dir() or any(into.iterdir())):
        raise SettingsError(f'--into "{into}" exists and is not empty; name a new folder.')


class Difference(NamedTuple):
    """How far two models' answers to `PROBES` are apart at most."""

    logit: float
    probability: float

    @classmethod
    def of(cls, found: Tensor, expected: Tensor) -> Difference:
        """Returns it for logits of one shape."""
        found, expected = found.float().cpu(), expected.float().cpu()
        likely = found.softmax(-1) - expected.softmax(-1)
        return cls(float((found - expected).abs().max()), float(likely.abs().max()))


class Form(NamedTuple):
    """What becomes of a quantised base."""

    quantized: Literal["dequantize", "requantize"] | None
    dtype: str | None

    @classmethod
    def of(cls, dequantize: bool, requantize: bool, dtype: str | None) -> Form:
        """Returns what the flags ask for.

        Raises:
            SettingsError: they contradict each other, or the dtype is unknown.
        """
        from graftune.errors import SettingsError, nearest

        if dequantize and requantize:
            raise SettingsError("--dequantize and --requantize: give one of the two.")
        if dtype is not None and dtype not in DTYPES:
            raise SettingsError(
                f'--dtype is "{dtype}"; expected {", ".join(DTYPES)}.{nearest(dtype, DTYPES)}'
            )
        if dtype is not None and requantize:
            raise SettingsError("--dtype is for plain weights: leave it out with --requantize.")
        asked = "dequantize" if dequantize else "requantize" if requantize else None
        return cls(asked, dtype)

    def check(self, loaded: Base) -> None:
        """Raises SettingsError where a base that isn't quantised is asked to change that."""
        from graftune.errors import SettingsError

        if self.quantized and not getattr(loaded.model, "is_quantized", False):
            raise SettingsError(
                f'--{self.quantized}: the base "{loaded.spec}" is loaded as plain weights; leave '
                "it out."
            )


def _merge(
    folder: Path, into: Path, base: str | None, form: Form, tolerance: float
) -> tuple[Difference, int]:
    """Returns the largest differences and the bytes written."""
    import torch

    import graftune as gt
    from graftune.cli.bases import load_base_of

    loaded = load_base_of(folder, base)
    form.check(loaded)
    gt.load(loaded.model, folder, name="merged")
    expected = logits(loaded)
    gt.merge(loaded.model, "merged", quantized=form.quantized)
    if form.dtype is not None:
        loaded.model.to(getattr(torch, form.dtype))
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


def _save_checked(loaded: Base, part: Path, expected: Tensor) -> Difference:
    """Saves the merged model and tokenizer, loads both again, returns the largest differences."""
    from graftune.sites.quantised import keep_exact

    part.parent.mkdir(parents=True, exist_ok=True)
    loaded.model.save_pretrained(part)
    loaded.tokenizer.save_pretrained(part)
    again: Any = type(loaded.model).from_pretrained(part, dtype=loaded.model.dtype)
    keep_exact(again)
    return Difference.of(logits(loaded, again.eval()), expected)


def _refuse_above(difference: Difference, tolerance: float) -> None:
    from graftune.errors import TrainingError

    if not difference.logit <= tolerance:
        raise TrainingError(
            f"the merged model's logits differ by up to {difference.logit:.3g} from those of base "
            f"and adapter (a probability by {difference.probability:.2g}), above --tolerance "
            f"{tolerance:g}; nothing was written. Load the base in float32 (--dequantize a "
            "quantised one), or accept it with a larger --tolerance."
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
