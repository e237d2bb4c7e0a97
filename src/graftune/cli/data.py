"""`graftune data`: what is in data, before anything is trained on it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graftune.cli.options import AsJson, Debug

if TYPE_CHECKING:
    from graftune.tasks.looking import Look

_BAR = 40
"""Letters of the longest bar."""
_LABELS = 30
"""Labels that are listed."""


def data(
    source: Annotated[
        str,
        typer.Argument(help="A file, a folder, a data set's name, or a settings file (YAML)."),
    ],
    task: Annotated[
        str | None, typer.Option(help="What the rows are for; else told from the columns.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Base model whose tokens are counted; no weights are read.")
    ] = None,
    validation: Annotated[str | None, typer.Option(help="Validation rows.")] = None,
    test: Annotated[str | None, typer.Option(help="Test rows.")] = None,
    text: Annotated[str | None, typer.Option(help="Column of the text.")] = None,
    label: Annotated[str | None, typer.Option(help="Column of the label.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Longest text, in tokens.")] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Bad rows are no problem: they will be left out.")
    ] = False,
    change: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any setting by its key, as data.seed=1; may be repeated."),
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Look at data before training: columns, labels, lengths, leaks.

    Ends with 2 where training would refuse the data, and says all that it would refuse.

    \b
    Examples:
      graftune data mail.csv
      graftune data mail.csv --base demo:minilm --max-length 64
      graftune data train.jsonl --test held-out.jsonl --task instruct --base demo:smollm2
      graftune data run.yaml --json
    """
    from graftune.cli import screen
    from graftune.cli.train import settings_from
    from graftune.tasks.looking import look

    file = Path(source) if source.lower().endswith((".yaml", ".yml")) else None
    flags = {
        "base": base or (None if file else "none"), "task": task,
        "data.train": None if file else source, "data.validation": validation, "data.test": test,
        "data.columns.text": text, "data.columns.label": label, "data.max_length": max_length,
        "data.skip_bad": skip_bad or None,
    }  # fmt: skip
    settings = settings_from(file, flags, change or [])
    known = settings.task if file else task
    found = look(settings, task=known, with_base=file is not None or base is not None)
    if as_json:
        screen.print_json(found.to_dict())
    else:
        _show(found)
    if found.problems:
        raise typer.Exit(2)


def _show(found: Look) -> None:
    from graftune.cli import screen

    told = " (told from the columns)" if found.guessed else ""
    pairs = [("task", found.task + told)]
    for name, columns in found.other_tasks.items():
        said = ", ".join(f"{role}: {column}" for role, column in columns.items())
        pairs.append(("could be", f"--task {name} ({said})"))
    screen.print_pairs(pairs)
    _show_columns(found)
    _show_splits(found)
    _show_labels(found)
    if found.histogram:
        most = max(one["rows"] for one in found.histogram)
        rows = [
            [f"{one['from']}–{one['to']}", "█" * -(-one["rows"] * _BAR // most), str(one["rows"])]
            for one in found.histogram
        ]
        screen.print_table(["tokens", "training rows", ""], rows, numbers=2)
        print()
    if found.trained:
        print(f"{found.trained['share']:.1%} of the training tokens are trained on.")
    for heading, lines in (
        ("", found.notes),
        ("\nRows of one text:", found.pairs),
        ("\nTraining refuses this data:", found.problems),
    ):
        for line in [heading, *lines] if heading and lines else lines:
            print(line)


def _show_columns(found: Look) -> None:
    from graftune.cli import screen

    rows = [
        [
            one["column"],
            one["role"] or "–",
            ", ".join(one["types"]),
            str(one["distinct"]),
            str(one["empty"]),
            ", ".join(one["could_be"]) if not one["role"] else "",
            one["example"].replace("\n", " "),
        ]
        for one in found.columns
    ]
    heads = ["column", "role", "types", "values", "empty", "could be", "first"]
    print()
    screen.print_table(heads, rows, numbers=len(heads))
    print()


def _show_splits(found: Look) -> None:
    from graftune.cli import screen

    report = found.data
    marks = list(next(iter(found.percentiles.values()), {}))
    heads = ["split", "rows", "left out", "repeated", *(f"tokens {m}" for m in marks)]
    heads += [f"over {report.max_length}"] if marks else []
    rows = [
        [
            split,
            f"{count:,}",
            str(sum(report.left_out.get(split, {}).values())),
            str(report.duplicates[split]),
            *(str(found.percentiles[split][mark]) for mark in marks),
            *([str(report.cut[split])] if marks else []),
        ]
        for split, count in report.rows.items()
    ]
    screen.print_table(heads, rows)
    print()


def _show_labels(found: Look) -> None:
    from graftune.cli import screen

    counts = found.data.labels
    names = sorted({name for split in counts.values() for name in split})
    names.sort(key=lambda name: -counts["train"].get(name, 0))
    total = max(sum(counts["train"].values()), 1)
    rows = [
        [
            name,
            *(str(split.get(name, 0)) for split in counts.values()),
            f"{counts['train'].get(name, 0) / total:.1%}",
        ]
        for name in names[:_LABELS]
    ]
    if rows:
        screen.print_table(["label", *counts, "of train"], rows)
        more = len(names) - len(rows)
        print(f"… and {more} labels more\n" if more else "")
    if found.entities:
        kinds = [[name, str(count)] for name, count in found.entities.items()]
        screen.print_table(["entities", "train"], kinds)
        print()
