"""`graftune intrinsic`: how few directions a task needs, as a curve."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graftune.cli.options import AsJson, Debug, Quiet

if TYPE_CHECKING:
    from graftune.compare.intrinsic import Dimension

_DATA, _SEARCH = "Base, data and budget", "Search"


def intrinsic(
    config: Annotated[
        Path | None,
        typer.Argument(help="Settings file (YAML), as for train; flags and --set change it."),
    ] = None,
    base: Annotated[str | None, typer.Option(help="Base model.", rich_help_panel=_DATA)] = None,
    data: Annotated[
        str | None, typer.Option("--data", "--train", help="Training rows.", rich_help_panel=_DATA)
    ] = None,
    validation: Annotated[
        str | None, typer.Option(help="Validation rows.", rich_help_panel=_DATA)
    ] = None,
    test: Annotated[str | None, typer.Option(help="Test rows.", rich_help_panel=_DATA)] = None,
    steps: Annotated[
        int | None, typer.Option(help="Steps of every run.", rich_help_panel=_DATA)
    ] = None,
    epochs: Annotated[
        float | None, typer.Option(help="Passes of every run.", rich_help_panel=_DATA)
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Rows per step.", rich_help_panel=_DATA)
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of every run.", rich_help_panel=_DATA)
    ] = None,
    change: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Any setting by its key; may be repeated.", rich_help_panel=_DATA
        ),
    ] = None,
    dims: Annotated[
        str | None, typer.Option(help="Values of d, with commas.", rich_help_panel=_SEARCH)
    ] = None,
    lr: Annotated[
        str | None,
        typer.Option(
            help="Learning rates tried for each d, with commas; the best on the validation rows "
            "counts.",
            rich_help_panel=_SEARCH,
        ),
    ] = None,
    full_lr: Annotated[
        str | None,
        typer.Option(
            help="Learning rates tried for full fine-tuning; else its own.",
            rich_help_panel=_SEARCH,
        ),
    ] = None,
    share: Annotated[
        float, typer.Option(help="Share of full fine-tuning to reach.", rich_help_panel=_SEARCH)
    ] = 0.9,
    reference: Annotated[
        float | None,
        typer.Option(
            help="The metric to compare with, instead of training full fine-tuning.",
            rich_help_panel=_SEARCH,
        ),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(help="Folder of all runs and of the page.", rich_help_panel=_SEARCH),
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Search the fewest numbers that nearly fine-tune the model.

    Full fine-tuning is trained once and SAID with each d, all with the same budget; d90 is the
    smallest d that reaches 90 % of full fine-tuning's metric on held-out rows. Every run is kept,
    and the same command goes on where it was stopped.

    \b
    Examples:
      graftune intrinsic --base demo:minilm --data mail.csv --steps 200
      graftune intrinsic --base demo:minilm --data mail.csv --dims 200,1000,5000 --lr 3e-3,1e-2
      graftune intrinsic run.yaml --reference 0.91 --set method.targets=blocks
    """
    from graftune.cli.progress import watcher
    from graftune.cli.train import settings_from
    from graftune.compare.intrinsic import DIMS, search

    flags: dict[str, Any] = {
        "base": base, "data.train": data, "data.validation": validation, "data.test": test,
        "train.steps": steps, "train.epochs": epochs, "train.batch_size": batch_size,
        "train.seed": seed, "out": out or (None if config else "runs/intrinsic"),
        "method": None if config else "SAID",
    }  # fmt: skip
    settings = settings_from(config, flags, change or [])
    found = search(
        settings,
        watcher(quiet=quiet),
        dims=numbers("--dims", dims, int) or DIMS,
        lrs=numbers("--lr", lr, float),
        full_lrs=numbers("--full-lr", full_lr, float),
        share=share,
        reference=reference,
    )
    _show(found, settings.run_dir, as_json)


def numbers(flag: str, text: str | None, kind: type[int] | type[float]) -> tuple[Any, ...]:
    """Returns the numbers of a comma-separated text.

    Raises:
        SettingsError: one isn't a number of the kind.

    Example:
        >>> numbers("--dims", "10, 200", int)
        (10, 200)
    """
    from graftune.errors import SettingsError

    found: list[Any] = []
    for part in (text or "").split(","):
        if not part.strip():
            continue
        try:
            found.append(kind(part.strip()))
        except ValueError:
            expected = "whole numbers" if kind is int else "numbers"
            raise SettingsError(
                f'{flag} takes {expected} with commas between them, found "{part.strip()}".'
            ) from None
    return tuple(found)


def _show(found: Dimension, folder: Path, as_json: bool) -> None:
    from graftune.cli import screen
    from graftune.compare.report.intrinsic import COLUMNS, rows, verdict

    if as_json:
        screen.print_json({**found.to_dict(), "report": str(folder / "report.html")})
        return
    screen.print_table(list(COLUMNS), rows(found))
    print(f"\n{verdict(found)}.")
    screen.print_pairs([("report", str(folder / "report.html"))])
