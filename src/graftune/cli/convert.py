"""`graftune convert`: one adapter in the form of HF PEFT, AdapterHub or graftune."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from graftune.cli.inspect import adapter_folder
from graftune.cli.options import AsJson, Debug


def convert(
    adapter: Annotated[Path, typer.Argument(help="A run's directory, or an adapter's.")],
    into: Annotated[Path, typer.Option("--into", help="The folder to write; must not exist yet.")],
    to: Annotated[str, typer.Option("--to", help="The form: own, peft or adapterhub.")] = "own",
    base: Annotated[
        str | None, typer.Option(help="The base model, if it isn't where the adapter says.")
    ] = None,
    head: Annotated[
        bool, typer.Option("--head/--no-head", help="Take the head along, if there is one.")
    ] = True,
    allow_pickle: Annotated[
        bool,
        typer.Option("--allow-pickle", help="Also read weights in .bin files; no code is run."),
    ] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write an adapter in the form of another program.

    Reads directories of graftune, HF PEFT and AdapterHub (adapters, adapter-transformers), and
    writes any of them. What the other program can't compute is refused with the reason. What is
    written is loaded once more before it is kept.

    \b
    Examples:
      graftune convert ./from-adapterhub --base ./bert --into own --allow-pickle
      graftune convert runs/classification-lora --to peft --into for-peft
      graftune convert ./some-peft-adapter --to adapterhub --into for-adapterhub
    """
    from graftune.cli import screen

    found = _convert(adapter_folder(adapter), into, to, base, head, allow_pickle)
    if as_json:
        screen.print_json(found)
        return
    from graftune.compare.report import words

    size = words.size(found["bytes"])
    print(f"{found['method']}, {found['parameters']:,} parameters, from {found['from']}")
    print(f"written to {into} as {_WORDS[to]} ({size})")


_WORDS = {"own": "graftune's", "peft": "HF PEFT's", "adapterhub": "AdapterHub's"}


def _convert(
    folder: Path, into: Path, to: str, base: str | None, head: bool, allow_pickle: bool
) -> dict[str, Any]:
    """Writes the other form and returns what it was."""
    import graftune as gt
    from graftune.cli.bases import load_model_of
    from graftune.formats.converting import write

    model = load_model_of(folder, base, head=head)
    options: dict[str, Any] = {"head": head, "allow_pickle": allow_pickle}
    loaded = gt.load(model, folder, **options)
    write(loaded, into, to)
    try:
        again = gt.load(model, into, name="again")
        _check_same(loaded.count(), again.count())
    except Exception:
        shutil.rmtree(into, ignore_errors=True)
        raise
    return {
        "into": str(into),
        "to": to,
        "from": str(folder),
        "method": loaded.method.name,
        "parameters": loaded.count(),
        "bytes": sum(file.stat().st_size for file in into.rglob("*") if file.is_file()),
    }


def _check_same(given: int, found: int) -> None:
    from graftune.errors import FormatError

    if given != found:
        raise FormatError(
            f"what was written has {found:,} parameters and what was read {given:,}: this is a "
            "mistake in graftune; nothing was kept."
        )
