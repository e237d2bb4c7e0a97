"""`graftune evaluate`: a run's metrics on its held-out rows or on others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from graftune.cli.options import AsJson, Debug, Drop


def evaluate(
    run: Annotated[Path, typer.Argument(help="A run's directory.")],
    data: Annotated[
        str | None, typer.Option(help="Other rows with labels; else the run's own split.")
    ] = None,
    split: Annotated[
        str, typer.Option(help="Which of the run's splits: test, validation or train.")
    ] = "test",
    batch_size: Annotated[int, typer.Option(help="Rows computed at once.", min=1)] = 32,
    drop: Drop = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Measure a trained adapter on held-out rows or your own.

    \b
    Examples:
      graftune evaluate runs/classification-lora
      graftune evaluate runs/classification-lora --data new-mail.csv --json
    """
    from graftune.cli import screen
    from graftune.compare.report import words
    from graftune.tasks.run import evaluate as measure

    found = measure(run, data, split, batch_size=batch_size, drop=drop)
    if as_json:
        screen.print_json(found)
        return
    rows = [
        [words.metric_name(key), words.metric_value(key, value)]
        for key, value in found["metrics"].items()
    ]
    screen.print_table([f"{found['rows']:,} {split} rows", data or str(run)], rows)
    screen.print_classes(found["classes"])
