"""Help in plain text: options under headings, examples as written, no library to wait for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from graftune.cli.ending import ends_well

OTHER = "Output"
"""The heading of options that name none."""


class Command(TyperCommand):
    """A command whose options are listed under their headings."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Writes each option under its `rich_help_panel`, in the order they are declared."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                heading = getattr(parameter, "rich_help_panel", None)
                heading = heading or _default_heading(parameter)
                sections.setdefault(heading, []).append(record)
        for heading in sorted(sections, key=lambda name: name == OTHER):
            with formatter.section(heading):
                formatter.write_dl(sections[heading], col_max=34)


class Group(TyperGroup):
    """The list of commands, in the order they are used rather than by letter."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Returns the commands' names in the order they were added."""
        return list(self.commands)


def add(app: typer.Typer, *commands: Callable[..., None]) -> None:
    """Adds functions as commands under their own names."""
    for command in commands:
        app.command(command.__name__, cls=Command)(ends_well(command))


def _default_heading(parameter: Any) -> str:
    return "Arguments" if parameter.param_type_name == "argument" else OTHER
