"""Options that several commands share, and the headings of their help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

AsJson = Annotated[
    bool, typer.Option("--json", help="Print the result as JSON on standard output, alone there.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress, only the result.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show where in the code an error comes from.")]
Drop = Annotated[
    int | None,
    typer.Option(
        min=0, help="Leave the adapter out of so many lowest blocks; else as it was trained."
    ),
]
With = Annotated[
    list[Path] | None,
    typer.Option("--with", help="Another run or adapter that votes with it; may be repeated."),
]
Vote = Annotated[
    str | None,
    typer.Option(help="With --with: majority counts likeliest labels (default), mean averages."),
]
