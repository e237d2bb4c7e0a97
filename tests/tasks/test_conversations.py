import json
from typing import Any

import pytest

from graftune.errors import DataError
from graftune.tasks.conversations import conversation

ASKED = {"role": "user", "content": "a"}
ANSWERED = {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    "value",
    [
        [ASKED, ANSWERED],
        json.dumps([ASKED, ANSWERED]),
        [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
    ],
)
def test_messages_come_in_several_shapes(value: Any) -> None:
    assert conversation({"m": value}, {"messages": "m"}, "row 1") == [ASKED, ANSWERED]


@pytest.mark.parametrize(("about", "content"), [("c", "a\n\nc"), ("", "a"), (None, "a")])
def test_input_follows_the_instruction(about: str | None, content: str) -> None:
    row = {"instruction": "a", "context": about, "response": "b"}
    columns = {"instruction": "instruction", "input": "context", "answer": "response"}
    assert conversation(row, columns, "row 1") == [{"role": "user", "content": content}, ANSWERED]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ([], 'row 1: "m" is no list of messages'),
        ("not json", 'row 1: "m" is no list of messages'),
        ([{"role": "usr", "content": "a"}], 'role "usr", expected user.*Did you mean "user"'),
        ([{"role": "user", "content": " "}], 'row 1, message 1: "content" is empty'),
        (["a"], "row 1, message 1 is 'a'"),
    ],
)
def test_a_broken_conversation_is_refused(value: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        conversation({"m": value}, {"messages": "m"}, "row 1")
