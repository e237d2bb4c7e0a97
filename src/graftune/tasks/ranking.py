"""Rank classification: the label whose words the untouched model finds likeliest after a prompt.

causal              log p(word | prompt), what prompts have in common run once (or not)
encoder-decoder     log p(word | prompt), the prompt being the encoder's
masked              the word's logit at the mask
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graftune.errors import DataError
from graftune.tasks.batches import batches_of_like_length
from graftune.tasks.data import Example
from graftune.tasks.demonstrations import nearest_to, text_of
from graftune.tasks.in_context import Demonstrations, InContext
from graftune.tasks.prompt_costs import PromptCosts
from graftune.tasks.prompt_text import TEXTS, PromptText
from graftune.tasks.scoring import AnswerTokens, EveryChoice, score_choices
from graftune.tasks.shared_prompt import SharedPrompt, begin
from graftune.tasks.templates import Template
from graftune.tasks.verbalizer import Verbalizer

if TYPE_CHECKING:
    from graftune.tasks.task import Ready

Told = Callable[[int], None]


class RankedPrompt:
    """A model that picks labels by prompts.

    Args:
        settings: The user's.
        template: Its text slots called by their roles.
        ready: The model, in eval mode.
        shown: What may be shown before a question.
        room: Tokens that the model takes in all.
    """

    def __init__(
        self,
        settings: InContext,
        template: Template,
        ready: Ready,
        shown: Demonstrations,
        room: int,
    ) -> None:
        self.settings, self.ready, self.shown, self.room = settings, ready, shown, room
        self.costs = PromptCosts()
        self._all: Verbalizer | None = None
        if ready.labels:
            self._all = Verbalizer.of(ready.labels, settings.words, settings.combine)
        self.text = PromptText(settings, template, ready)
        self._mask: Any = ready.tokenizer.mask_token_id
        self._parted = bool(ready.model.config.is_encoder_decoder)
        self._answers = AnswerTokens(ready) if self._parted else None
        self._shared: SharedPrompt | None = None

    def answers(
        self,
        examples: Sequence[Example],
        *,
        batch_size: int,
        max_new_tokens: int = 0,
        told: Told | None = None,
    ) -> list[dict[str, Any]]:
        """Returns each text with its likeliest label, how likely among the labels, and the others.

        Raises:
            DataError: A text has no room beside the demonstrations.
        """
        del max_new_tokens
        began = time.monotonic()
        if not examples:
            return []
        verbalizers = [self.verbalizer(example) for example in examples]
        words = [[self.word(word) for word in one.every] for one in verbalizers]
        prompts = self.prompts(examples, words)
        started = self._start(prompts)
        scores = self._scores(prompts, words, batch_size, told)
        found = [
            _answer(example, verbalizer, row)
            for example, verbalizer, row in zip(examples, verbalizers, scores, strict=True)
        ]
        self.costs.rows += len(examples)
        self.costs.seconds += time.monotonic() - began - started
        return found

    def verbalizer(self, example: Example) -> Verbalizer:
        """Returns what is said for the labels, or for the choices that a row has of its own."""
        own: list[str] | None = example.fields.get("choices")
        if own is None and self._all is not None:
            return self._all
        names = own or []
        words = {name: said for name, said in self.settings.words.items() if name in names}
        return Verbalizer.of(names, words, self.settings.combine)

    def word(self, word: str) -> list[int]:
        """Returns the tokens that are scored for a word."""
        return self._answers.of_choice(word) if self._answers else self.text.answer(word)

    def beside(self, words: Sequence[Sequence[int]]) -> int:
        """Returns the room that the longest of some words needs beside a prompt."""
        apart = self._parted or self.text.mask is not None
        return 0 if apart else max(map(len, words))

    def prompts(
        self, examples: Sequence[Example], words: Sequence[Sequence[Sequence[int]]]
    ) -> list[list[int]]:
        """Returns the prompts' tokens, with room for the longest of their words."""
        found: list[list[int]] = []
        for example, shown, said in zip(examples, self._shown(examples), words, strict=True):
            texts = {role: example.fields[role] for role in TEXTS if role in example.fields}
            room = self.room - self.beside(said)
            ids = self.text.prompt(self.text.before(shown), texts, room, example.where)
            if self.text.mask is not None and ids.count(self._mask) != 1:
                raise DataError(
                    f'{example.where}: its prompt holds "{self.text.mask}" more than once: take it '
                    "out of the texts."
                )
            found.append(ids)
        return found

    def _shown(self, examples: Sequence[Example]) -> list[list[dict[str, Any]]]:
        if self.shown.vectors is None or not self.settings.shots:
            return [self.shown.rows] * len(examples)
        texts = [text_of(example.fields) for example in examples]
        self.costs.tokens += sum(len(self.text.ids(text)) for text in texts)
        return nearest_to(texts, self.settings.shots, self.shown, self.ready)

    def _start(self, prompts: Sequence[Sequence[int]]) -> float:
        """Runs what the prompts have in common, unless that was done; returns how long it took."""
        if self._parted or self.text.mask is not None or not self.settings.share:
            return 0.0
        rows = [] if self.shown.vectors is not None else self.shown.rows
        before = self.text.ids(self.text.before(rows)) if rows or self.settings.instruction else []
        earlier = self.costs.start_seconds
        self._shared = begin(self._shared, self.ready, before, prompts, self.costs)
        return self.costs.start_seconds - earlier

    def _scores(
        self,
        prompts: Sequence[list[int]],
        words: Sequence[Sequence[list[int]]],
        batch_size: int,
        told: Told | None,
    ) -> list[Tensor]:
        """Returns each prompt's scores of its words."""
        if self.text.mask is not None:
            return self._at_mask(prompts, words, batch_size, told)
        alone = sum(
            len(ids) + len(word) for ids, said in zip(prompts, words, strict=True) for word in said
        )
        self.costs.tokens_alone += alone
        if self._shared is None:
            self.costs.tokens += alone
            sums = score_whole(self.ready, prompts, words, batch_size, told)
        else:
            before = self._shared.tokens
            sums = self._shared.scores(prompts, words, batch_size, told)
            self.costs.tokens += self._shared.tokens - before
        if not self.settings.length_normalised:
            return sums
        lengths = [torch.tensor([len(word) for word in said]) for said in words]
        return [one / length for one, length in zip(sums, lengths, strict=True)]

    def _at_mask(
        self,
        prompts: Sequence[list[int]],
        words: Sequence[Sequence[list[int]]],
        batch_size: int,
        told: Told | None,
    ) -> list[Tensor]:
        found: list[Any] = [None] * len(prompts)
        rows = [{"input_ids": ids} for ids in prompts]
        done = 0
        for indices, batch in batches_of_like_length(rows, self.ready, batch_size):
            with torch.inference_mode():
                logits = self.ready.model(**batch).logits.float()
            for at, index in enumerate(indices):
                tokens = [word[0] for word in words[index]]
                found[index] = logits[at, prompts[index].index(self._mask), tokens].cpu()
            done += len(indices)
            if told is not None:
                told(done)
        tokens = sum(map(len, prompts))
        self.costs.tokens += tokens
        self.costs.tokens_alone += tokens
        return found


def score_whole(
    ready: Ready,
    prompts: Sequence[list[int]],
    words: Sequence[Sequence[list[int]]],
    batch_size: int,
    told: Told | None = None,
) -> list[Tensor]:
    """Returns the log-probability of each word after its prompt, every pair run as a whole."""
    pad: Any = ready.tokenizer.pad_token_id
    config: Any = ready.model.config
    start = config.decoder_start_token_id if config.is_encoder_decoder else None
    rows = [{"input_ids": ids, "choices": said} for ids, said in zip(prompts, words, strict=True)]
    size = max(1, batch_size // max(map(len, words)))
    found: list[Any] = [None] * len(rows)
    done = 0
    collate = EveryChoice(int(pad or 0), start)
    for indices, batch in batches_of_like_length(rows, ready, size, collate=collate):
        with torch.inference_mode():
            betas = score_choices(ready.model, batch).table.cpu()
        for index, row in zip(indices, betas, strict=True):
            lengths = torch.tensor([len(word) for word in words[index]])
            found[index] = row[: len(lengths)] * lengths
        done += len(indices)
        if told is not None:
            told(done)
    return found


def _answer(example: Example, verbalizer: Verbalizer, scores: Tensor) -> dict[str, Any]:
    names = list(verbalizer.words)
    chances: list[float] = torch.softmax(verbalizer.scores(scores), dim=-1).tolist()
    found: Mapping[str, float] = dict(zip(names, chances, strict=True))
    best = max(found, key=found.__getitem__)
    texts = {role: example.fields[role] for role in TEXTS if role in example.fields}
    return {**texts, "label": best, "score": found[best], "probabilities": dict(found)}
