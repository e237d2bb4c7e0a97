"""Verbalisers: the words that a model says for a label, and a label's score from its words'.

    score(label) = mean (or sum, or log-sum-exp) over its words of score(word)

A word's score is its logit at the mask, or its log-probability after a prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from graftune.errors import SettingsError, nearest

if TYPE_CHECKING:
    from torch import Tensor

Combine = Literal["mean", "sum", "logsumexp"]


@dataclass(frozen=True)
class Verbalizer:
    """What is said for each label.

    Example:
        >>> found = Verbalizer.of(["0", "1"], {"1": ["good", "great"], "0": "bad"})
        >>> found.words, found.first("1")
        ({'0': ('bad',), '1': ('good', 'great')}, 'good')
    """

    words: dict[str, tuple[str, ...]]
    """The words of each label, in the labels' order."""
    combine: Combine = "mean"

    @classmethod
    def of(
        cls,
        labels: Sequence[str],
        words: Mapping[str, str | Sequence[str]],
        combine: Combine = "mean",
    ) -> Verbalizer:
        """Returns a verbaliser; a label that `words` leaves out says its own name.

        Raises:
            SettingsError: `words` names something else, has no word for a label, or one for two.
        """
        for label in words:
            if label not in labels:
                raise SettingsError(
                    f'words: "{label}" is no label; there are {", ".join(labels)}.'
                    f"{nearest(label, labels)}"
                )
        found = {label: _listed(words.get(label, label)) for label in labels}
        whose: dict[str, str] = {}
        for label, said in found.items():
            if not said or not all(word.strip() for word in said):
                raise SettingsError(f'words: the label "{label}" has no word to say.')
            for word in said:
                if whose.setdefault(word, label) != label or said.count(word) > 1:
                    raise SettingsError(
                        f'words: "{word}" is said for "{whose[word]}" and again for "{label}".'
                    )
        return cls(found, combine)

    @property
    def every(self) -> list[str]:
        """All words, label by label."""
        return [word for said in self.words.values() for word in said]

    def first(self, label: str) -> str:
        """Returns the word that demonstrations say for a label."""
        return self.words[label][0]

    def scores(self, of_words: Tensor) -> Tensor:
        """Returns the labels' scores `(…, labels)` from those of `every` word `(…, words)`."""
        import torch

        parts = of_words.split([len(said) for said in self.words.values()], dim=-1)
        reduce: dict[str, Any] = {
            "mean": lambda part: part.mean(dim=-1),
            "sum": lambda part: part.sum(dim=-1),
            "logsumexp": lambda part: torch.logsumexp(part, dim=-1),
        }
        return torch.stack([reduce[self.combine](part) for part in parts], dim=-1)


def only_token(word: str, ids: Sequence[int], pieces: Sequence[str]) -> int:
    """Returns a word's one token.

    Raises:
        SettingsError: It has several, which one mask can't say.
    """
    if len(ids) == 1:
        return ids[0]
    raise SettingsError(
        f'words: "{word}" is {len(ids)} tokens of this model ({", ".join(pieces)}), but a mask '
        "holds one: choose another word for its label, as in --set method.words.LABEL=WORD."
    )


def _listed(words: str | Sequence[str]) -> tuple[str, ...]:
    return (words,) if isinstance(words, str) else tuple(words)
