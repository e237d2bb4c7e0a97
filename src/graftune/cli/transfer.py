"""`graftune transfer`: which prompts of other tasks a new task is like, and tuning it from them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graftune.cli.options import AsJson, Debug, Quiet

if TYPE_CHECKING:
    from graftune.compare.transfer import Transfer
    from graftune.tasks.settings import RunSettings


def transfer(
    target: Annotated[
        str,
        typer.Argument(
            help="The target task's prompt, early: its run's directory, or a checkpoint's."
        ),
    ],
    sources: Annotated[
        list[str] | None,
        typer.Argument(help="Prompts of other tasks: directories of runs or adapters."),
    ] = None,
    how: Annotated[
        str,
        typer.Option(
            help="best: tune from each of the k likest, the best on validation rows counts; "
            "average: from their weighted average; mixture: from one prompt trained on their rows "
            "and its own; rank: train nothing."
        ),
    ] = "best",
    k: Annotated[
        int | None, typer.Option(help="How many sources are used; else 3, or all if fewer.")
    ] = None,
    similarity: Annotated[
        str,
        typer.Option(help="mean: cosine of the mean tokens; pairs: mean cosine of all pairs."),
    ] = "mean",
    settings: Annotated[
        Path | None,
        typer.Option(help="Settings file of the target's runs; else that of the target's run."),
    ] = None,
    change: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any setting of these runs by its key; may be repeated."),
    ] = None,
    source_settings: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=FILE: settings file with a source's task and data, for a mixture, where it "
            "isn't in its run's directory; may be repeated."
        ),
    ] = None,
    cap: Annotated[
        int | None, typer.Option(help="Rows of one task at most in a mixture; else 524,288.")
    ] = None,
    out: Annotated[
        str | None, typer.Option(help="Folder of all runs; else the target's, NAME-transfer.")
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Start a task's prompt from the prompts of tasks like it.

    The target's prompt after a short run says what the task is like. The sources are ranked by how
    like it theirs are, and the target is tuned from the likest. Every run is kept, and the same
    command goes on where it was stopped.

    \b
    Examples:
      graftune transfer runs/early runs/a runs/b runs/c --how rank
      graftune transfer runs/early runs/a runs/b runs/c --k 2 --set train.steps=1000
      graftune transfer runs/early runs/a runs/b --how average --similarity pairs
      graftune transfer runs/early runs/a runs/b --how mixture --cap 5000
    """
    from graftune.cli.progress import watcher
    from graftune.compare.transfer import transfer as found_by

    made = found_by(
        target,
        sources or [],
        watcher(quiet=quiet),
        how=how,
        k=k,
        kind=similarity,
        settings=_settings(target, settings, change or []),
        source_settings=_told(source_settings or []),
        cap=cap,
        out=out,
    )
    _show(made, as_json)


def _settings(target: str, file: Path | None, changes: list[str]) -> RunSettings:
    from graftune.compare.sources import settings_of
    from graftune.tasks.settings import RunSettings

    if file is not None:
        return RunSettings.from_yaml(file, changes)
    return settings_of(target).with_overrides(changes)


def _told(given: list[str]) -> dict[str, RunSettings]:
    """Returns settings by the name that stands before each file's."""
    from graftune.errors import SettingsError
    from graftune.tasks.settings import RunSettings

    found: dict[str, RunSettings] = {}
    for text in given:
        name, mark, file = text.partition("=")
        if not (name and mark and file):
            raise SettingsError(f'--source-settings is "{text}", expected NAME=FILE.')
        found[name] = RunSettings.from_yaml(Path(file))
    return found


def _show(made: Transfer, as_json: bool) -> None:
    from graftune.cli import screen
    from graftune.compare.report import words

    if as_json:
        screen.print_json(made.to_dict())
        return
    metric = words.metric_name(made.metric)
    columns = ["source", "similarity"]
    columns += {
        "best": [f"validation {metric}", f"test {metric}"],
        "average": ["weight"],
        "mixture": ["rows"],
    }.get(made.how, [])
    rows: list[list[str]] = []
    for source in made.ranking:
        cells = [source.name, f"{source.similarity:.3f}"]
        if made.how == "average":
            cells.append("–" if source.weight is None else words.percent(source.weight))
        if made.how == "mixture":
            cells.append(f"{made.mixture[source.name]:,}" if source.name in made.mixture else "–")
        if made.how == "best":
            scores = [source.metrics.get(split, {}) for split in ("validation", "test")]
            cells += [words.metric_value(made.metric, found.get(made.metric)) for found in scores]
        rows.append(cells)
    screen.print_table(columns, rows)
    if made.chosen:
        said = ", ".join(
            f"{words.metric_value(made.metric, found.get(made.metric))} {split} {metric}"
            for split, found in made.metrics.items()
        )
        screen.print_pairs([("kept", f"{made.chosen} ({said})"),
                            ("next", f'graftune predict {made.chosen} "some text"')])  # fmt: skip
