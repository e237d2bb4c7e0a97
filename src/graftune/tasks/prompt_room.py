"""Whether prompts fit into a model, seen before any is run; and what one looks like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from graftune.errors import FormatError, SettingsError
from graftune.tasks.chat_prompt import ChatPrompt
from graftune.tasks.data import Example
from graftune.tasks.in_context import InContext, template_of
from graftune.tasks.models import base_config
from graftune.tasks.prompt_text import TEXTS, Wording
from graftune.tasks.ranking import RankedPrompt
from graftune.tasks.task import Ready


def check_room(prompt: RankedPrompt | ChatPrompt, examples: Sequence[Example], base: str) -> str:
    """Checks prompts for examples against the model's tokenizer and its positions.

    Returns:
        A sentence that says how long they are.

    Raises:
        SettingsError: One is too long, or a word isn't what a mask can say.
        FormatError: The tokenizer makes tokens that the model doesn't have.
    """
    if isinstance(prompt, ChatPrompt):
        question, parts = _chat_lengths(prompt, examples)
    else:
        question, parts = _lengths(prompt, examples)
    if prompt.settings.select == "nearest":
        parts = sorted(parts, reverse=True)
    shots = prompt.settings.shots
    total = question + sum(parts[:shots])
    if total > prompt.room:
        fits = sum(question + sum(parts[:n]) <= prompt.room for n in range(1, shots + 1))
        raise SettingsError(
            f"The longest prompt has {total:,} tokens ({shots} demonstrations "
            f"{total - question:,}, question and answer {question:,}), but {base} takes "
            f"{prompt.room:,}: {fits} shots would fit (method.shots), or cut the texts "
            "(data.max_length)."
        )
    return f"The longest prompt has {total:,} tokens, {total - question:,} of them demonstrations."


def first_prompt(
    base: str,
    method: InContext,
    columns: Mapping[str, str],
    rows: Sequence[dict[str, Any]],
    example: Example,
) -> str:
    """Returns a question with what stands before it, as text; a chat's turns one by one.

    Where the nearest rows are shown, any stand in for them: which they are, only the model knows.

    Raises:
        SettingsError: The template is not for this base.
    """
    rows = rows[: method.shots]
    if "messages" in example.fields:
        turns = [turn for row in rows for turn in row["messages"]]
        asked = [turn for turn in example.fields["messages"] if turn["role"] != "assistant"]
        return "\n".join(f"{turn['role']}: {turn['content']}" for turn in [*turns, *asked])
    template = template_of(method, base, base_config(base), columns)
    wording = Wording(method, template, "[MASK]")
    return wording.before(rows) + wording.question(example.fields)


def _lengths(prompt: RankedPrompt, examples: Sequence[Example]) -> tuple[int, list[int]]:
    """Returns the tokens of the longest question with its answer, and of each demonstration."""
    text, question = prompt.text, 0
    seen: list[list[int]] = []
    for example in examples:
        texts = {
            role: text.cut(example.fields[role], text.max_length)
            for role in TEXTS
            if role in example.fields
        }
        ids = text.ids(text.before([]) + text.question(texts))
        words = [prompt.word(word) for word in prompt.verbalizer(example).every]
        question = max(question, len(ids) + prompt.beside(words))
        seen += [ids, *words]
    parts: list[int] = []
    for row in prompt.shown.rows:
        ids = text.ids(text.demonstration(row) + prompt.settings.separator)
        seen.append(ids)
        parts.append(len(ids) - text.specials)
    _check_vocabulary(seen, prompt.ready)
    return question, parts


def _chat_lengths(prompt: ChatPrompt, examples: Sequence[Example]) -> tuple[int, list[int]]:
    """Returns the tokens of the longest conversation, and of each demonstration's."""
    seen: list[list[int]] = []
    for example in examples:
        asked = example.fields["messages"]
        seen.append(prompt.turns(prompt.before([], asked) + asked).ids)
    shown = [prompt.turns(row["messages"]).ids for row in prompt.shown.rows]
    _check_vocabulary([*seen, *shown], prompt.ready)
    return max(map(len, seen)), [len(ids) for ids in shown]


def _check_vocabulary(sequences: Sequence[Sequence[int]], ready: Ready) -> None:
    """Raises FormatError where the tokenizer makes tokens that the model doesn't have."""
    embeddings: Any = ready.model.get_input_embeddings()
    size: int = embeddings.weight.shape[0]
    most = max(max(ids, default=0) for ids in sequences)
    if most >= size:
        raise FormatError(
            f"The tokenizer doesn't match the base: it makes the token {most:,}, but the model has "
            f"embeddings for {size:,}."
        )
