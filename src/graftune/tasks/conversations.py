"""Conversations in the shapes in which data sets bring them.

messages        [{"role": "user", "content": …}, {"role": "assistant", "content": …}]
conversations   [{"from": "human", "value": …}, {"from": "gpt", "value": …}]      (ShareGPT)
alpaca          instruction, input, output
dolly           instruction, context, response
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, cast

from graftune.errors import DataError, nearest

MESSAGES = ("messages", "conversations", "conversation")
INSTRUCTIONS = ("instruction", "prompt", "question", "query")
INPUTS = ("input", "context")
ANSWERS = ("answer", "output", "response", "completion", "reply")

_ROLES = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "system": "system",
}


def conversation(
    row: Mapping[str, Any], columns: Mapping[str, str], where: str
) -> list[dict[str, str]]:
    """Returns a row as messages `{role, content}`, the roles named user, assistant and system.

    Raises:
        DataError: A turn has an unknown role or no text; the row has no turn.
    """
    if "messages" in columns:
        return _turns(row.get(columns["messages"]), columns["messages"], where)
    asked = _text(row.get(columns["instruction"]), columns["instruction"], where)
    about = row.get(columns["input"]) if "input" in columns else None
    if about is not None and not isinstance(about, str):
        raise DataError(f'{where}: "{columns["input"]}" is {about!r}, expected a text.')
    asked = f"{asked}\n\n{about}" if about and about.strip() else asked
    messages = [{"role": "user", "content": asked}]
    if "answer" in columns:
        answer = _text(row.get(columns["answer"]), columns["answer"], where)
        messages.append({"role": "assistant", "content": answer})
    return messages


def _turns(value: Any, column: str, where: str) -> list[dict[str, str]]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            value = None
    if not isinstance(value, list) or not value:
        raise DataError(f'{where}: "{column}" is no list of messages {{"role", "content"}}.')
    turns = cast(list[Any], value)
    return [_turn(turn, f"{where}, message {n}") for n, turn in enumerate(turns, start=1)]


def _turn(turn: Any, where: str) -> dict[str, str]:
    if not isinstance(turn, Mapping):
        raise DataError(f'{where} is {turn!r}, expected {{"role": …, "content": …}}.')
    turn = cast(Mapping[str, Any], turn)
    said = str(turn.get("role", turn.get("from")))
    role = _ROLES.get(said.lower())
    if role is None:
        raise DataError(
            f'{where} has the role "{said}", expected user, assistant or system.'
            f"{nearest(said, _ROLES)}"
        )
    content = _text(turn.get("content", turn.get("value")), "content", where)
    return {"role": role, "content": content}


def _text(value: Any, column: str, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f'{where}: "{column}" is {value!r}, expected a text.')
    if not value.strip():
        raise DataError(f'{where}: "{column}" is empty.')
    return value
