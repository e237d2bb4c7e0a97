"""`graftune evaluate`: a run's metrics on its held-out rows or on others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from graftune.cli.options import AsJson, Debug, Drop, Vote, With


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
    others: With = None,
    vote: Vote = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Measure a trained adapter on held-out rows or your own.

    \b
    Examples:
      graftune evaluate runs/classification-lora
      graftune evaluate runs/classification-lora --data new-mail.csv --json
      graftune evaluate runs/a --with runs/b --with runs/c --vote mean
    """
    from graftune.cli import screen
    from graftune.compare.report import words
    from graftune.tasks.run import evaluate as measure

    found = measure(
        run, data, split, batch_size=batch_size, drop=drop, others=others or (), vote=vote
    )
    if as_json:
        screen.print_json(found)
        return
    columns = {data or str(run): found["metrics"]}
    if "members" in found:
        columns = {one["path"]: one["metrics"] for one in found["members"]}
        columns |= {f"{found['vote']} vote": found["metrics"]}
    rows = [
        [words.metric_name(key), *(words.metric_value(key, one[key]) for one in columns.values())]
        for key in found["metrics"]
    ]
    screen.print_table([f"{found['rows']:,} {split} rows", *columns], rows)
    screen.print_classes(found["classes"])
