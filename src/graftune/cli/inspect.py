"""`graftune inspect`: what an adapter directory holds and which programs take it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from graftune.cli.options import AsJson, Debug


def inspect(
    folder: Annotated[Path, typer.Argument(help="An adapter's directory, or a run's.")],
    check_values: Annotated[
        bool,
        typer.Option("--check-values", help="Also look for values that aren't finite."),
    ] = False,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Tell what an adapter is and which programs load it.

    Shows method, base, ranks, targets and sizes, and for PEFT, vLLM, SGLang, LoRAX and llama.cpp
    whether they take it, what stands in the way, and how to mend that. It reads headers only: no
    model, no torch, instant for any size. HF PEFT's directories as well.

    \b
    Examples:
      graftune inspect runs/classification-lora
      graftune inspect ./some-peft-adapter --check-values --json
    """
    from graftune.cli import screen
    from graftune.formats.inspecting import inspect as look

    found = look(adapter_folder(folder), check_values=check_values)
    if as_json:
        screen.print_json(found.to_dict())
        return
    print(found)
    if tensors:
        rows = [
            [entry.name, " × ".join(map(str, entry.shape)), entry.dtype, f"{entry.count:,}"]
            for entry in found.tensors
        ]
        print()
        screen.print_table(["tensor", "shape", "type", "values"], rows)


def adapter_folder(folder: Path) -> Path:
    """Returns a run directory's adapter, or the directory itself when it is no run's."""
    inside = folder / "adapter"
    is_run = (inside / "adapter_config.json").is_file()
    return inside if is_run and not (folder / "adapter_config.json").is_file() else folder
