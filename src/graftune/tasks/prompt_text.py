"""A prompt as text and as tokens: instruction, demonstrations, question, and the words that answer.

Text: late parcel          ┐
Label: delivery            │ what all questions have in common, unless each has its own
                           ┘
Text: my money please      ┐ a question
Label:                     ┘
 refund                      an answer's tokens, which begin with the space before {label}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from graftune.errors import DataError, SettingsError
from graftune.tasks.in_context import InContext
from graftune.tasks.templates import Template
from graftune.tasks.verbalizer import only_token

if TYPE_CHECKING:
    from graftune.tasks.task import Ready

TEXTS = ("text", "text_pair")


class Wording:
    """Writes prompts as text.

    Args:
        settings: The user's.
        template: Its text slots called by their roles.
        mask: What stands at {mask} in a question.
    """

    def __init__(self, settings: InContext, template: Template, mask: str | None = None) -> None:
        self.settings, self.template = settings, template
        self.mask: str | None = mask if template.has("mask") else None
        self._asked, after = template.parted()
        self.after = after.filled({}) if self.mask is None else ""
        """What stands behind an answer."""

    def demonstration(self, row: Mapping[str, Any]) -> str:
        """Returns a row with its answer, or the part of it that is shown."""
        answer: str = row["answer"]
        said = self.settings.words.get(answer, answer)
        word = said if isinstance(said, str) else said[0]
        if self.settings.format == "labels-only":
            return word
        if self.settings.format == "inputs-only":
            return "\n".join(row[role] for role in TEXTS if role in row)
        return self.template.filled(row, word)

    def before(self, rows: Sequence[Mapping[str, Any]]) -> str:
        """Returns what stands before a question: the instruction and the demonstrations."""
        parts = [self.settings.instruction] if self.settings.instruction else []
        parts += [self.demonstration(row) for row in rows]
        return "".join(part + self.settings.separator for part in parts)

    def question(self, texts: Mapping[str, str]) -> str:
        """Returns a row without its answer: up to its place, or with a mask there."""
        if self.mask is not None:
            return self.template.filled(texts, self.mask)
        return self._asked.filled(texts).rstrip()

    def head(self) -> tuple[str, str]:
        """Returns the hard text before the answer ("?" if there is none), and the space between."""
        segments = self._asked.segments
        if self.mask is not None:
            segments = segments[: [one.kind for one in segments].index("mask")]
        hard = segments[-1].value if segments and segments[-1].kind == "hard" else ""
        return hard.rstrip() or "?", hard[len(hard.rstrip()) :]


class PromptText(Wording):
    """Writes prompts as one model's tokens.

    Args:
        settings: The user's.
        template: Its text slots called by their roles.
        ready: The model with its tokenizer; texts are cut to its `max_length`.
    """

    def __init__(self, settings: InContext, template: Template, ready: Ready) -> None:
        self.tokenizer: Any = ready.tokenizer
        super().__init__(settings, template, self.tokenizer.mask_token)
        self.max_length = ready.max_length
        self._known: dict[str, list[int]] = {}

    def ids(self, text: str) -> list[int]:
        """Returns a prompt's tokens with those that the tokenizer puts around it."""
        found: list[int] = list(self.tokenizer(text, verbose=False)["input_ids"])
        ends = self.mask is None and found[-1:] == [self.tokenizer.eos_token_id]
        return found[:-1] if ends else found

    @property
    def specials(self) -> int:
        """How many tokens the tokenizer puts around a prompt."""
        return len(self.ids("?")) - len(self._tokens("?"))

    def prompt(self, before: str, texts: Mapping[str, str], room: int, where: str) -> list[int]:
        """Returns a whole prompt of at most `room` tokens, the question's text cut if need be.

        Raises:
            DataError: There is no room for any of it.
        """
        texts = {role: self.cut(text, self.max_length) for role, text in texts.items()}
        ids = self.ids(before + self.question(texts))
        while len(ids) > room:
            longest = max(texts, key=lambda role: len(texts[role]))
            left = len(self._tokens(texts[longest])) - (len(ids) - room)
            if left < 1:
                raise DataError(
                    f"{where}: {len(ids)} tokens, but a prompt and its answer may have {room} "
                    "before the answer; show fewer demonstrations (method.shots)."
                )
            texts[longest] = self.cut(texts[longest], left)
            ids = self.ids(before + self.question(texts))
        return ids

    def cut(self, text: str, most: int) -> str:
        """Returns the beginning of a text that is at most so many tokens."""
        found = self._tokens(text)
        return text if len(found) <= most else text[: found[most - 1]]

    def answer(self, word: str) -> list[int]:
        """Returns a word's tokens after the prompt, with the template's text behind it.

        Raises:
            SettingsError: It has none, or for a mask several, or one that the model doesn't know.
        """
        if word not in self._known:
            head, space = self.head()
            found = self.tokenizer(
                head + space + word + self.after,
                add_special_tokens=False,
                return_offsets_mapping=True,
            )
            pairs = zip(found["input_ids"], found["offset_mapping"], strict=True)
            ids = [token for token, (start, stop) in pairs if start >= len(head) and stop > start]
            self._check_word(word, ids)
            self._known[word] = ids
        return self._known[word]

    def _check_word(self, word: str, ids: Sequence[int]) -> None:
        pieces = self.tokenizer.convert_ids_to_tokens(list(ids))
        if not ids or all(token == self.tokenizer.unk_token_id for token in ids):
            raise SettingsError(
                f"words: the model's tokenizer doesn't know \"{word}\": choose another word, as in "
                "--set method.words.LABEL=WORD."
            )
        if self.mask is not None:
            only_token(word, ids, pieces)

    def _tokens(self, text: str) -> list[int]:
        """Returns where each token of a text ends in it."""
        found = self.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        return [stop for _, stop in found["offset_mapping"]]
