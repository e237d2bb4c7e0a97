"""Puts the commands together; each lives in a file of its own."""

from __future__ import annotations

from typing import Annotated

import typer

from graftune.cli.compare import compare
from graftune.cli.convert import convert
from graftune.cli.data import data
from graftune.cli.demo import demo
from graftune.cli.evaluate import evaluate
from graftune.cli.helptext import Group, add
from graftune.cli.inspect import inspect
from graftune.cli.intrinsic import intrinsic
from graftune.cli.merge import merge
from graftune.cli.methods import methods
from graftune.cli.plan import plan
from graftune.cli.predict import predict
from graftune.cli.train import train
from graftune.cli.transfer import transfer

app = typer.Typer(
    cls=Group,
    rich_markup_mode=None,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"graftune {version('graftune')}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Fine-tune any Hugging Face transformer with few trained parameters.

    Attach a method to a pretrained model, train it on your rows, save a small adapter, merge it:

    \b
      graftune demo                                  see it work, on two cores in minutes
      graftune train --base demo:minilm --data mail.csv --method lora --r 8
      graftune predict runs/classification-lora "where is my parcel?"
      graftune train run.yaml --set train.lr=3e-4    the same from a file
      graftune methods lora                          what each setting means

    Exit codes: 0 done, 1 the run failed, 2 wrong settings or data, 130 stopped by Ctrl-C.
    """


add(
    app,
    *(demo, data, plan, train, compare, evaluate, predict, inspect),
    *(convert, merge, methods, intrinsic, transfer),
)
