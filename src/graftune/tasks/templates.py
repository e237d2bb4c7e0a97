"""Templates: a row's texts as the prompt that a model reads, with slots in braces.

    "{text} {soft:3} It was {mask}."

    {text}      a text of the row, named by its role (text, text_pair) or by its column
    {label}     the answer: a word in a demonstration, in a question the end of the prompt
    {mask}      the answer's place for a masked model, whose mask token stands there in a question
    {soft:3}    three virtual tokens, for a method that trains them
    {{ and }}   braces
    the rest    hard text, as it stands

Source: patterns and verbalisers as in Schick & Schütze 2020, arXiv 2001.07676 (PET); virtual tokens
among hard ones as in Liu et al. 2021, arXiv 2103.10385 (P-tuning).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from string import Formatter
from typing import Literal

from graftune.errors import SettingsError, nearest

Kind = Literal["text", "hard", "soft", "mask", "label"]


@dataclass(frozen=True)
class Segment:
    """One piece of a template."""

    kind: Kind
    value: str = ""
    """The hard text, or the text slot's name."""
    length: int = 0
    """Virtual tokens of a soft piece."""


@dataclass(frozen=True)
class Template:
    """A template's pieces in their order.

    Example:
        >>> found = Template.of("{text} It was {mask}.")
        >>> found.filled({"text": "So good!"}, "great")
        'So good! It was great.'
    """

    text: str
    """As it was written."""
    segments: tuple[Segment, ...]

    @classmethod
    def of(cls, text: str) -> Template:
        """Returns a template from its text.

        Raises:
            SettingsError: It has no slot for a text, a slot that can't be, or a brace too many.
        """
        try:
            parts = list(Formatter().parse(text))
        except ValueError as error:
            raise SettingsError(
                f'template "{text}": {error}; a brace that is meant is written twice, {{{{ or }}}}.'
            ) from None
        found: list[Segment] = []
        for hard, name, spec, conversion in parts:
            if hard:
                found.append(Segment("hard", hard))
            if name is not None:
                found.append(_slot(text, name, spec or "", conversion))
        template = cls(text, tuple(found))
        template._check()
        return template

    @property
    def soft_tokens(self) -> int:
        """How many virtual tokens it has."""
        return sum(segment.length for segment in self.segments)

    @property
    def texts(self) -> tuple[str, ...]:
        """The names of its text slots, each once."""
        named = [one.value for one in self.segments if one.kind == "text"]
        return tuple(dict.fromkeys(named))

    def has(self, kind: Kind) -> bool:
        """Whether a piece of this kind is in it."""
        return any(segment.kind == kind for segment in self.segments)

    def bound(self, columns: Mapping[str, str]) -> Template:
        """Returns the template with each text slot called by its role.

        Args:
            columns: The data's column of each role.

        Raises:
            SettingsError: A slot is neither a role's name nor a column's.
        """
        roles = {column: role for role, column in columns.items()} | {
            role: role for role in columns
        }
        roles = {name: role for name, role in roles.items() if role in ("text", "text_pair")}
        for name in self.texts:
            if name not in roles:
                raise SettingsError(
                    f'template "{self.text}": {{{name}}} is no text of the data, which has '
                    f"{', '.join(f'{{{known}}}' for known in roles)}; the other slots are "
                    f"{{label}}, {{mask}} and {{soft:N}}.{nearest(name, roles)}"
                )
        pieces = [
            replace(one, value=roles[one.value]) if one.kind == "text" else one
            for one in self.segments
        ]
        return replace(self, segments=tuple(pieces))

    def parted(self) -> tuple[Template, Template]:
        """Returns what stands before the answer ({label}) and what after it, if anything."""
        places = [at for at, one in enumerate(self.segments) if one.kind == "label"]
        at = places[0] if places else len(self.segments)
        return (
            replace(self, segments=self.segments[:at]),
            replace(self, segments=self.segments[at + 1 :]),
        )

    def filled(self, texts: Mapping[str, str], answer: str = "", marker: str = "") -> str:
        """Returns the template with a row's texts (by role) and an answer in it.

        Args:
            texts: Of the row.
            answer: What stands at {label} or {mask}.
            marker: What stands at {soft:N}, N times: the token of a `gt.PTuning(marker=...)`.
        """
        parts: list[str] = []
        for one in self.segments:
            if one.kind in ("label", "mask"):
                parts.append(answer)
            elif one.kind == "soft":
                parts.append(marker * one.length)
            else:
                parts.append(texts[one.value] if one.kind == "text" else one.value)
        return "".join(parts)

    def _check(self) -> None:
        if not self.has("text"):
            raise SettingsError(
                f'template "{self.text}" has no slot for a text: write {{text}} where it belongs.'
            )
        answers = [one.kind for one in self.segments if one.kind in ("label", "mask")]
        if len(answers) > 1:
            raise SettingsError(
                f'template "{self.text}" has {len(answers)} places for the answer '
                f"({', '.join(f'{{{kind}}}' for kind in answers)}), expected one."
            )


def _slot(text: str, name: str, spec: str, conversion: str | None) -> Segment:
    if conversion or (spec and name != "soft") or not name.strip():
        shown = name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
        raise SettingsError(
            f'template "{text}": {{{shown}}} is no slot; there are {{text}}, {{label}}, {{mask}} '
            "and {soft:N}."
        )
    if name == "soft":
        if not spec.isdecimal() or int(spec) < 1:
            raise SettingsError(
                f'template "{text}": {{soft}} needs a number of virtual tokens, as {{soft:3}}.'
            )
        return Segment("soft", length=int(spec))
    if name == "mask":
        return Segment("mask")
    return Segment("label") if name == "label" else Segment("text", name)
