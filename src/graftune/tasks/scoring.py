"""Answers scored by a language model: each token's log-probability, and their mean, beta.

text  "is it good?" ──┬── "yes" </s>     log p of each token ─ mean ─ beta(yes)
                      └── "no" </s>                                   beta(no)
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from graftune.tasks.chat import IGNORED, end_tokens, prompt_tokens, tokens_of
from graftune.training.lengths import PadToLongest

if TYPE_CHECKING:
    from graftune.tasks.task import Ready

Loss = Literal["lm", "unlikelihood", "length-normalised"]
_SURE = -1e-6
"""Where log p is held before log(1 - p), which is infinite at p = 1."""


class AnswerTokens:
    """Texts and answers as the tokens that one model reads and says."""

    def __init__(self, ready: Ready) -> None:
        self.tokenizer = ready.tokenizer
        self.ends = end_tokens(ready.tokenizer, ready.model)
        self.parted = bool(ready.model.config.is_encoder_decoder)
        self.chats = bool(self.tokenizer.chat_template) and not self.parted
        self.known: dict[str, list[int]] = {}

    def of_prompt(self, text: str) -> list[int]:
        """Returns a text's tokens: an encoder's, the user's turn, or as they are."""
        if self.chats:
            return prompt_tokens(self.tokenizer, [{"role": "user", "content": text}])
        ids: list[int] = list(self.tokenizer(text, verbose=False)["input_ids"])
        return ids if self.parted or ids[-1] != self.tokenizer.eos_token_id else ids[:-1]

    def of_choice(self, text: str) -> list[int]:
        """Returns an answer's tokens with the end token, which are the same after any text."""
        if text not in self.known:
            ids = self._choice(text)
            ended = ids[-1:] and ids[-1] in self.ends
            self.known[text] = ids if ended else [*ids, cast(int, self.tokenizer.eos_token_id)]
        return self.known[text]

    def _choice(self, text: str) -> list[int]:
        if self.parted:
            return list(self.tokenizer(text_target=text)["input_ids"])
        if self.chats:
            turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": text}]
            labels = tokens_of(self.tokenizer, turns, self.ends).labels
            return [label for label in labels if label != IGNORED]
        found = self.tokenizer(f"? {text}", return_offsets_mapping=True)
        pairs = zip(found["input_ids"], found["offset_mapping"], strict=True)
        return [token for token, (start, stop) in pairs if start >= 1 and stop > start]


class EveryChoice:
    """Makes a batch of rows: one sequence for each choice of each row, in order.

    `row` (sequences,) says whose choice a sequence is, `targets` its answer's tokens, −100
    elsewhere, and `labels` (rows,) which choice is right. With `start` an answer is a decoder's.
    """

    def __init__(self, pad_token_id: int, start: int | None = None, *, side: str = "right") -> None:
        self.pad = PadToLongest(pad_token_id, side=side)
        self.answers = PadToLongest(pad_token_id)
        self.start = start

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Returns tensors `(sequences, longest)`; `labels` comes first, as it counts the rows."""
        right = (
            {"labels": torch.tensor([row["labels"] for row in rows])} if "labels" in rows[0] else {}
        )
        pairs = [(row["input_ids"], choice) for row in rows for choice in row["choices"]]
        whose = [index for index, row in enumerate(rows) for _ in row["choices"]]
        if self.start is None:
            batch = self.pad(
                [
                    {"input_ids": [*asked, *said], "labels": [IGNORED] * len(asked) + [*said]}
                    for asked, said in pairs
                ]
            )
            targets = batch.pop("labels")
        else:
            batch = self.pad([{"input_ids": asked} for asked, _ in pairs])
            shifted = [{"input_ids": [self.start, *said[:-1]], "labels": said} for _, said in pairs]
            decoder = self.answers(shifted)
            batch["decoder_input_ids"], targets = decoder["input_ids"], decoder["labels"]
        return {**right, **batch, "targets": targets, "row": torch.tensor(whose)}


def score_choices(model: Any, batch: Mapping[str, Any]) -> Scored:
    """Returns how a model scores the choices of a batch that `EveryChoice` made."""
    inputs = {k: v for k, v in batch.items() if k not in ("labels", "row", "targets")}
    targets = batch["targets"]
    if "decoder_input_ids" in inputs:
        return Scored(model(**inputs).logits, targets, batch["row"])
    targets = _only_answers(model, inputs, targets)
    return Scored(model(**inputs).logits[:, :-1], targets, batch["row"])


class Scored:
    """The log-probabilities of answers, and the losses of T-Few.

    Args:
        logits: `(sequences, tokens, vocabulary)`, each position's for its target.
        targets: `(sequences, tokens)`, −100 where there is none.
        row: the row of each sequence, `(sequences,)`, ascending.
    """

    def __init__(self, logits: Tensor, targets: Tensor, row: Tensor) -> None:
        wanted = targets != IGNORED
        self.row, self.column = row, place_in_row(row)
        self.sequence = wanted.nonzero()[:, 0]  # of each token
        chosen = logits[wanted].float()
        self.tokens = -F.cross_entropy(chosen, targets[wanted], reduction="none")
        sums = self.tokens.new_zeros(len(row)).index_add(0, self.sequence, self.tokens)
        self.beta = sums / wanted.sum(dim=1)
        rows, choices = int(row[-1]) + 1, int(self.column.max()) + 1
        empty = self.beta.new_full((rows, choices), -torch.inf)
        self.table = empty.index_put((row, self.column), self.beta)
        """beta by row and choice; −inf beyond a row's last choice."""

    def loss(self, right: Tensor, losses: Sequence[Loss]) -> Tensor:
        """Returns the sum of losses, a mean over the rows, the right choices being `(rows,)`."""
        terms = {
            "lm": self.lm,
            "unlikelihood": self.unlikelihood,
            "length-normalised": self.length_normalised,
        }
        return torch.stack([terms[name](right) for name in losses]).sum(dim=0).mean()

    def lm(self, right: Tensor) -> Tensor:
        """Returns L_LM of each row."""
        return -self.table.gather(1, right[:, None])[:, 0]

    def unlikelihood(self, right: Tensor) -> Tensor:
        """Returns L_UL of each row."""
        wrong = (self.column != right[self.row])[self.sequence]
        row = self.row[self.sequence][wrong]
        unsaid = torch.log(-torch.expm1(self.tokens[wrong].clamp(max=_SURE)))  # log(1 - p)
        zeros = unsaid.new_zeros(len(right))
        number = zeros.index_add(0, row, torch.ones_like(unsaid))
        return -zeros.index_add(0, row, unsaid) / number

    def length_normalised(self, right: Tensor) -> Tensor:
        """Returns L_LN of each row."""
        return F.cross_entropy(self.table, right, reduction="none")


def place_in_row(row: Tensor) -> Tensor:
    """Returns each sequence's number among those of its row."""
    first = torch.searchsorted(row, row)
    return torch.arange(len(row), device=row.device) - first


def _only_answers(model: Any, batch: dict[str, Any], targets: Tensor) -> Tensor:
    """Returns a causal model's shifted targets; only their logits are asked for, if it allows."""
    first = 1
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        first = int((targets != IGNORED).any(dim=0).nonzero()[0])
        batch["logits_to_keep"] = targets.shape[1] - first + 1
    return targets[:, first:]
