"""`graftune methods`: the methods there are, and what each setting means."""

from __future__ import annotations

import json
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
    from graftune.tasks.in_context import InContext, is_in_context

    if name and is_in_context({"name": name}):
        _show_in_context(as_json)
        return
    chosen = [find(name)] if name else list(registered().values())
    if as_json:
        described = [_as_dict(method) for method in chosen]
        screen.print_json(described[0] if name else described)
    elif name:
        _explain(chosen[0])
    else:
        listed = [*chosen, InContext]
        rows = [[method.name, method.summary, method.paper] for method in listed]
        screen.print_table(["method", "what it trains", "paper"], rows, numbers=9)
        print("\ngraftune methods NAME explains one and its settings.")


def _show_in_context(as_json: bool) -> None:
    """Explains the baseline that is no method: it trains nothing."""
    from graftune.cli import screen
    from graftune.tasks.in_context import InContext

    settings = [
        (name, field.annotation, field.get_default(call_default_factory=True), field.description)
        for name, field in InContext.model_fields.items()
    ]
    if as_json:
        named = [
            {"name": name, "type": _type_text(hint), "default": default, "doc": doc}
            for name, hint, default, doc in settings
        ]
        about = {"name": InContext.name, "summary": InContext.summary, "paper": InContext.paper}
        screen.print_json({**about, "default_lr": None, "settings": named})
        return
    print(f"{InContext.name}: {InContext.summary}\n{InContext.paper}\n")
    for name, hint, default, doc in settings:
        _explain_setting(name, default, hint, doc or "")
    _explain_use(InContext.name)


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
        _explain_setting(one.name, one.default, hints[one.name], one.doc)
    _explain_use(method.name.lower())


def _explain_setting(name: str, default: Any, hint: Any, doc: str) -> None:
    print(f"  {name} = {_default_text(default)}    ({_type_text(hint)})")
    text = " ".join(doc.split())
    print(textwrap.fill(text, 92, initial_indent="      ", subsequent_indent="      "))


def _explain_use(name: str) -> None:
    print(f"\ngraftune train --method {name} --set method.SETTING=VALUE, or in a settings file:")
    print(f"  method: {{name: {name}, SETTING: VALUE}}")


def _default_text(value: Any) -> str:
    if value is None or value == "":
        return "none"
    if isinstance(value, tuple):
        return f"[{', '.join(str(item) for item in value)}]"
    if isinstance(value, str) and value != value.strip():
        return json.dumps(value)
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
