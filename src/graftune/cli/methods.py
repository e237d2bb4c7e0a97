"""`graftune methods`: the methods there are, and what each setting means."""

from __future__ import annotations

import textwrap
import types
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graftune.cli.options import AsJson, Debug

if TYPE_CHECKING:
    from graftune.methods.base import Method


def methods(
    name: Annotated[
        str | None, typer.Argument(help="A method, in any case; without it, all are listed.")
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """List the methods, or explain one with all its settings.

    \b
    Examples:
      graftune methods
      graftune methods lora
    """
    from graftune.cli import screen
    from graftune.methods import methods as registered
    from graftune.methods.base import find

    chosen = [find(name)] if name else list(registered().values())
    if as_json:
        described = [_as_dict(method) for method in chosen]
        screen.print_json(described[0] if name else described)
    elif name:
        _explain(chosen[0])
    else:
        rows = [[method.name, method.summary, method.paper] for method in chosen]
        screen.print_table(["method", "what it trains", "paper"], rows, numbers=9)
        print("\ngraftune methods NAME explains one and its settings.")


def _as_dict(method: type[Method]) -> dict[str, Any]:
    hints = typing.get_type_hints(method)
    return {
        "name": method.name,
        "summary": method.summary,
        "paper": method.paper,
        "default_lr": method.default_lr,
        "settings": [
            {
                "name": one.name,
                "type": _type_text(hints[one.name]),
                "default": one.default,
                "doc": one.doc,
            }
            for one in method.settings()
        ],
    }


def _explain(method: type[Method]) -> None:
    print(f"{method.name}: {method.summary}\n{method.paper}\n")
    print(f"Learning rate to start from: {method.default_lr:g}\n")
    hints = typing.get_type_hints(method)
    for one in method.settings():
        kind = _type_text(hints[one.name])
        print(f"  {one.name} = {_default_text(one.default)}    ({kind})")
        print(textwrap.fill(one.doc, 92, initial_indent="      ", subsequent_indent="      "))
    name = method.name.lower()
    print(f"\ngraftune train --method {name} --set method.SETTING=VALUE, or in a settings file:")
    print(f"  method: {{name: {name}, SETTING: VALUE}}")


def _default_text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, tuple):
        return f"[{', '.join(str(item) for item in value)}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _type_text(hint: Any) -> str:
    """Returns a type in words: "int or none", "list of str", "one of a, b"."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_type_text(one) for one in arguments))
    if origin is typing.Literal:
        return "one of " + ", ".join(str(one) for one in arguments)
    if origin in (tuple, list):
        return f"list of {_type_text(arguments[0])}"
    if origin in (dict, Mapping):
        return f"mapping of {_type_text(arguments[0])} to {_type_text(arguments[1])}"
    if hint in (None, type(None)):
        return "none"
    return {bool: "true or false", str: "text"}.get(hint, getattr(hint, "__name__", str(hint)))
