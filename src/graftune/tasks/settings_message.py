"""One clear line for each thing that is wrong in the settings."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from pydantic import BaseModel, ValidationError

from graftune.errors import nearest
from graftune.tasks.settings_yaml import KeyPath

Where = Callable[[KeyPath], str]
"""Gives the place (`run.yaml:17`) of a key, or ''."""


def settings_message(
    error: ValidationError, model: type[BaseModel], where: Where | None = None
) -> str:
    """Returns one line per problem: place, key, what is wrong, what was found, the nearest right.

    Args:
        error: What pydantic found.
        model: The model of the outermost keys, where the names of the right keys come from.
        where: The place of a key, when the settings come from a file.
    """
    return "\n".join(_problem(dict(item), model, where) for item in error.errors())


def _problem(item: dict[str, Any], model: type[BaseModel], where: Where | None) -> str:
    path = tuple(str(part) for part in item["loc"])
    place = where(path) if where else ""
    head = f"{place}: {'.'.join(path)}" if place else ".".join(path)
    if item["type"] == "extra_forbidden":
        choices = list(_section(model, path[:-1]).model_fields)
        return f"{head}: unknown key.{nearest(path[-1], choices) or _known(choices)}"
    if item["type"] == "missing":
        return f"{head}: missing."
    return f"{head}: {_reason(item)}"


def _reason(item: dict[str, Any]) -> str:
    if item["type"] in {"model_type", "dict_type", "model_attributes_type"}:
        return f"expected keys and values below it, found {item['input']!r}."
    reason = str(item["msg"]).removeprefix("Value error, ")
    if item["type"] == "value_error":
        return f"{reason}."
    hint = ""
    if item["type"] == "literal_error":
        hint = nearest(str(item["input"]), re.findall(r"'([^']*)'", item["ctx"]["expected"]))
    return f"{reason[0].lower()}{reason[1:]}, found {item['input']!r}.{hint}"


def _known(choices: list[str]) -> str:
    return f" Known here: {', '.join(choices)}."


def _section(model: type[BaseModel], path: KeyPath) -> type[BaseModel]:
    for key in path:
        inner = model.model_fields[key].annotation if key in model.model_fields else None
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            model = inner
    return model
