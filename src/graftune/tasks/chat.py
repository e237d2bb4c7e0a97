r"""Conversations as tokens: the chat template, and labels on the assistant's answers alone.

    text     <|im_start|>user\nHow?<|im_end|>\n<|im_start|>assistant\nSo.<|im_end|>\n
    labels                                                          So.<|im_end|>

The text is rendered whole and tokenised once; where an answer begins and ends in it comes from
rendering the conversation up to that turn. The end token is always among the labels, so that a
trained model stops.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from graftune.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Messages = list[dict[str, str]]
IGNORED = -100

PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '### ' + message['role'].capitalize() + '\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant\n' }}{% endif %}"
)
"""The template of a tokenizer that brings none."""


@dataclass(frozen=True)
class Turns:
    """A conversation as tokens."""

    ids: list[int]
    labels: list[int]
    """The tokens of the answers; −100 elsewhere."""
    closed: bool
    """Whether the template itself ends each answer with an end token."""


def render(tokenizer: PreTrainedTokenizerBase, messages: Messages, *, ask: bool) -> str:
    """Returns a conversation as the template's text; `ask` opens the assistant's turn after it.

    Raises:
        DataError: The template refuses the conversation.
    """
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(f"The chat template refuses the turns {roles}: {error}.") from error
    return str(text)


def end_tokens(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> frozenset[int]:
    """Returns the tokens that end an answer: the tokenizer's and those `generate` stops at."""
    settings: Any = getattr(model, "generation_config", None)
    stops: Any = getattr(settings, "eos_token_id", None)
    listed: list[Any] = list(stops) if isinstance(stops, list | tuple) else [stops]
    own: Any = tokenizer.eos_token_id
    return frozenset(int(token) for token in (*listed, own) if token is not None)


def tokens_of(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, ends: frozenset[int]
) -> Turns:
    """Returns a conversation as tokens, labelled where the assistant answers.

    Raises:
        DataError: The template rewrites earlier turns when later ones come, so that what the
            assistant said can't be found in the whole.
    """
    text = render(tokenizer, messages, ask=False)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids: list[int] = list(encoded["input_ids"])
    starts = [start for start, _ in encoded["offset_mapping"]]
    labels = [IGNORED] * len(ids)
    closed = True
    for start, stop in _answers(tokenizer, messages, text):
        inside = [i for i, at in enumerate(starts) if start <= at < stop]
        last = next((i for i in inside if ids[i] in ends), None)
        closed = closed and last is not None
        for i in inside:
            if last is None or i <= last:
                labels[i] = ids[i]
    end: Any = tokenizer.eos_token_id
    if not closed and messages[-1]["role"] == "assistant" and end is not None:
        ids.append(int(end))
        labels.append(int(end))
    return Turns(ids, labels, closed)


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> list[int]:
    """Returns the tokens of a conversation that the assistant is to go on with."""
    text = render(tokenizer, messages, ask=True)
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _answers(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, text: str
) -> list[tuple[int, int]]:
    """Returns where each answer starts and stops in the whole text."""
    found: list[tuple[int, int]] = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render(tokenizer, messages[:index], ask=True)
        after = render(tokenizer, messages[: index + 1], ask=False)
        if not (text.startswith(after) and after.startswith(before)):
            raise DataError(
                "The tokenizer's chat template rewrites earlier turns when later ones come, so the "
                f"answer {message['content'][:40]!r} can't be found in it; train on single turns "
                "or with another template."
            )
        found.append((len(before), len(after)))
    return found


def shorten(turns: Turns, limit: int) -> tuple[Turns, str]:
    """Returns a conversation of at most `limit` tokens, and what it lost.

    Later turns go first, as long as one whole answer stays. Else the middle of the first answer's
    prompt goes, and only when that isn't enough the end of the answer. What was lost is "", "later
    turns", "part of the prompt" or "part of the answer".
    """
    if len(turns.ids) <= limit:
        return turns, ""
    start, stop = _first_answer(turns.labels)
    if stop <= limit:
        return Turns(turns.ids[:limit], turns.labels[:limit], turns.closed), "later turns"
    kept_answer = min(stop - start, limit - min(start, limit // 4))
    room = limit - kept_answer
    ids = _without_middle(turns.ids[:start], room) + turns.ids[start : start + kept_answer]
    labels = [IGNORED] * room + turns.labels[start : start + kept_answer]
    lost = "part of the prompt" if kept_answer == stop - start else "part of the answer"
    return Turns(ids, labels, turns.closed), lost


def shorten_prompt(ids: Sequence[int], limit: int) -> list[int]:
    """Returns a prompt of at most `limit` tokens: its middle goes, beginning and end stay."""
    return list(ids) if len(ids) <= limit else _without_middle(list(ids), limit)


def _first_answer(labels: Sequence[int]) -> tuple[int, int]:
    start = next(i for i, label in enumerate(labels) if label != IGNORED)
    stop = next((i for i in range(start, len(labels)) if labels[i] == IGNORED), len(labels))
    return start, stop


def _without_middle(ids: list[int], room: int) -> list[int]:
    head = room // 2
    return ids[:head] + ids[len(ids) - (room - head) :]
