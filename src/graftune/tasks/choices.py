"""Choosing among answers: a language model's own probability of each decides (T-Few).

    log p_t             of each token of an answer, given the text
    beta                their mean: the length-normalised log-probability of an answer
    lm                  L_LM = -beta of the right answer
    unlikelihood        L_UL = -mean over all tokens of wrong answers of log(1 - p_t)
    length-normalised   L_LN = -log softmax(beta of all choices) of the right answer

columns   text (and text_pair), label, and choices; without them, all labels of the training data
head      none: the language model's own, causal or encoder-decoder
batches   every choice of every row is one sequence, all in one forward pass, padded
metrics   accuracy of the likeliest choice by beta (rank classification)
answer    {"text", "label", "score", "probabilities": {choice: p}}

Source: Liu et al. 2022, arXiv 2205.05638, section 3.2. The sums are a row's, and a batch's loss the
mean over its rows; the authors' code pools the tokens of a batch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from graftune.errors import DataError, SettingsError, nearest
from graftune.tasks.chat import shorten_prompt
from graftune.tasks.classification import (
    LABELS,
    TEXTS,
    class_names,
    text_key,
    texts_of,
    usual_pair,
)
from graftune.tasks.columns import find_column
from graftune.tasks.conversations import ANSWERS, INSTRUCTIONS
from graftune.tasks.data import Example, normalised
from graftune.tasks.label_notes import label_of
from graftune.tasks.models import LANGUAGE_MODEL
from graftune.tasks.scoring import AnswerTokens, EveryChoice, Loss, place_in_row, score_choices
from graftune.tasks.settings import Columns, TaskOptions
from graftune.tasks.tables import Table
from graftune.tasks.task import Encoded, Ready, Task, cut_note, register_task

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

CHOICES = ("choices", "options", "answer_choices", "candidates", "endings")
_QUESTIONS = (*TEXTS, *INSTRUCTIONS)
_RIGHT = (*LABELS, *ANSWERS)


class ChoiceOptions(TaskOptions):
    """How choices are learnt."""

    losses: tuple[Loss, ...] = ("lm", "unlikelihood", "length-normalised")
    """The losses that are summed."""
    words: dict[str, str] = Field(default_factory=dict)
    """What the model says for a label, where that isn't its name: {"0": "no", "1": "yes"}."""


@register_task
class Choices(Task):
    """The likeliest of several answers to a text."""

    name: ClassVar[str] = "choices"
    summary: ClassVar[str] = "the likeliest of several answers, by a language model (T-Few)"
    model_task: ClassVar[str] = LANGUAGE_MODEL
    epochs: ClassVar[float] = 10
    batch_size: ClassVar[int] = 8
    max_length: ClassVar[int] = 512
    metric: ClassVar[str] = "accuracy"
    metrics: ClassVar[tuple[str, ...]] = ("accuracy",)
    roles: ClassVar[tuple[str, ...]] = ("text", "text_pair", "choices", "label")
    picks: ClassVar[bool] = True
    options_type: ClassVar[type[TaskOptions]] = ChoiceOptions

    def __init__(self, options: ChoiceOptions | None = None) -> None:
        self._options = options or ChoiceOptions()
        if not self._options.losses:
            raise SettingsError("task_options.losses is empty: name one loss or more.")

    @property
    def options(self) -> ChoiceOptions:
        """See `Task.options`."""
        return self._options

    def columns(self, table: Table, named: Columns) -> dict[str, str]:
        """Returns the columns of text, text_pair (of pairs), choices (if any) and label."""
        found = _asked(table, named)
        choices = find_column(table, "choices", named.choices, CHOICES, required=False)
        found["choices"] = choices
        found["label"] = find_column(table, "label", named.label, _RIGHT)
        return {role: column for role, column in found.items() if column is not None}

    def examples(self, table: Table, columns: Mapping[str, str]) -> list[Example]:
        """Returns each row's text(s), choices and right answer.

        Raises:
            DataError: A text is empty, the choices are no list, or the label is none of them.
        """
        return [
            _example(row, columns, table.where(index), answered=True)
            for index, row in enumerate(table.rows)
        ]

    def question(self, row: str | Mapping[str, Any], where: str) -> Example:
        """Returns a text, or a row with usual names, without the right answer."""
        row = {"text": row} if isinstance(row, str) else row
        table = Table([dict(row)], where)
        choices = find_column(table, "choices", None, CHOICES, required=False)
        found = _asked(table, Columns()) | {"choices": choices}
        columns = {role: column for role, column in found.items() if column is not None}
        return _example(row, columns, where, answered=False)

    def labels(self, splits: Mapping[str, Sequence[Example]]) -> list[str]:
        """Returns the training data's labels; [] where each row brings its own choices.

        Raises:
            DataError: They can't be learnt.
            SettingsError: `words` names something else.
        """
        names = class_names(splits) if splits["train"][0].stratum else []
        for label in self._options.words if names else ():
            if label not in names:
                raise SettingsError(
                    f'task_options.words: "{label}" is no label; there are {", ".join(names)}.'
                    f"{nearest(label, names)}"
                )
        return names

    def prepare(self, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """Changes nothing.

        Raises:
            DataError: The tokenizer has no end token, which tells "yes" from "yes, but".
        """
        if tokenizer.eos_token_id is None:
            raise DataError(
                "The base's tokenizer has no end token, so an answer's end can't be scored: set "
                "tokenizer.eos_token, save the tokenizer and use that folder."
            )
        return []

    def encode(self, examples: Sequence[Example], ready: Ready) -> Encoded:
        """Returns each text's tokens, each choice's, and the right one's number.

        Raises:
            DataError: There is nothing to choose from, or no room for a text beside a choice.
        """
        tokens, encoded = AnswerTokens(ready), Encoded()
        for example in examples:
            names = list(example.fields.get("choices") or ready.labels)
            if not names:
                raise DataError(f"{example.where}: give the choices, a list, beside the text.")
            choices = [tokens.of_choice(self._options.words.get(name, name)) for name in names]
            room = ready.max_length - (0 if tokens.parted else max(map(len, choices)))
            if room < 1:
                raise DataError(
                    f"{example.where}: a choice has {max(map(len, choices))} tokens, but a text "
                    f"and its choice may have {ready.max_length} in all (data.max_length)."
                )
            prompt = tokens.of_prompt("\n".join(texts_in(example)))
            encoded.lengths.append(len(prompt) + ready.max_length - room)
            row: dict[str, Any] = {"input_ids": shorten_prompt(prompt, room), "choices": choices}
            if "answer" in example.fields:
                row["labels"] = names.index(example.fields["answer"])
            encoded.features.append(row)
        encoded.notes = cut_note(encoded.lengths, ready.max_length, " in the middle")
        return encoded

    def collate(self, ready: Ready) -> Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]:
        """Returns what makes one sequence of each choice."""
        pad: Any = ready.tokenizer.pad_token_id
        start: Any = None
        if ready.model.config.is_encoder_decoder:
            start = ready.model.config.decoder_start_token_id
        return EveryChoice(int(pad or 0), start)

    def forward(self, model: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Returns beta of each choice, `logits` `(rows, choices)`, and with labels the loss."""
        scored = score_choices(model, batch)
        if "labels" not in batch:
            return {"logits": scored.table}
        loss = scored.loss(batch["labels"], self._options.losses)
        return {"loss": loss, "logits": scored.table}

    def inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Returns the sequences of the right choices alone, labelled on their answers."""
        right = place_in_row(batch["row"]) == batch["labels"][batch["row"]]
        kept = {key: batch[key][right] for key in ("input_ids", "attention_mask")}
        return {**kept, "labels": batch["targets"][right]}

    def summarise(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Returns the likeliest choice and the right one of each row, `(rows, 2)`."""
        import torch

        return torch.stack([logits.argmax(dim=-1), labels], dim=-1)

    def score(self, summaries: Any, labels: Any) -> dict[str, float]:
        """Returns the accuracy of summaries, or of chosen numbers against `labels`."""
        chosen, right = summaries.T if summaries.ndim == 2 else (summaries, labels)
        return {"accuracy": float((chosen == right).mean())}

    def answer(
        self, examples: Sequence[Example], ready: Ready, *, batch_size: int, max_new_tokens: int
    ) -> list[dict[str, Any]]:
        """Returns each text with its likeliest choice, how likely, and the others."""
        import torch

        from graftune.tasks.batches import batches_of_like_length

        rows = [
            {key: row[key] for key in row if key != "labels"}
            for row in self.encode(examples, ready).features
        ]
        answers: list[dict[str, Any]] = [{} for _ in rows]
        collate = self.collate(ready)
        for indices, batch in batches_of_like_length(rows, ready, batch_size, collate=collate):
            with torch.inference_mode():
                chances = torch.softmax(self.forward(ready.model, batch)["logits"], dim=-1)
            for index, row in zip(indices, chances.tolist(), strict=True):
                answers[index] = _answer(examples[index], row, ready.labels)
        return answers


def texts_in(example: Example) -> list[str]:
    """Returns an example's one or two texts."""
    return [example.fields[role] for role in ("text", "text_pair") if role in example.fields]


def _asked(table: Table, named: Columns) -> dict[str, str | None]:
    text, pair = named.text, named.text_pair
    if text is None and pair is None:
        text, pair = usual_pair(table)
    return {
        "text": find_column(table, "text", text, _QUESTIONS),
        "text_pair": find_column(table, "text_pair", pair, (), required=False),
    }


def _example(
    row: Mapping[str, Any], columns: Mapping[str, str], where: str, *, answered: bool
) -> Example:
    fields: dict[str, Any] = dict(texts_of(row, columns, where))
    key, stratum = text_key(fields), ""
    if "choices" in columns:
        fields["choices"] = _choices(row.get(columns["choices"]), columns["choices"], where)
        key = "\x1f".join([key, *map(normalised, fields["choices"])])
    if answered:
        label = label_of(row.get(columns["label"]))
        if not label:
            raise DataError(f'{where}: the label ("{columns["label"]}") is missing.')
        own = fields.get("choices")
        fields["answer"] = label if own is None else _right(label, own, where)
        stratum = label if own is None else ""
    return Example(fields, key, stratum, where)


def _choices(value: Any, column: str, where: str) -> list[str]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            value = None
    if isinstance(value, Mapping):  # ARC's {"text": [...], "label": ["A", ...]}
        value = value.get("text")
    found = [label_of(item) for item in value] if isinstance(value, list | tuple) else []
    if len(found) < 2 or not all(found) or len(set(found)) < len(found):
        raise DataError(
            f'{where}: "{column}" is {value!r:.80}, expected a list of two or more different texts.'
        )
    return found


def _right(label: str, choices: Sequence[str], where: str) -> str:
    """Returns the choice that a label names, by its text or else its number or letter."""
    if label in choices:
        return label
    if label.isdecimal() and int(label) < len(choices):
        return choices[int(label)]
    if len(label) == 1 and "A" <= label.upper() <= chr(ord("A") + len(choices) - 1):
        return choices[ord(label.upper()) - ord("A")]
    raise DataError(
        f'{where}: the label "{label}" is none of the choices, {", ".join(choices)}, nor the '
        f"number of one, from 0, or its letter.{nearest(label, choices)}"
    )


def _answer(example: Example, chances: Sequence[float], labels: Sequence[str]) -> dict[str, Any]:
    names: Sequence[str] = example.fields.get("choices") or labels
    found = dict(zip(names, chances, strict=False))
    best = max(found, key=found.__getitem__)
    texts = {role: example.fields[role] for role in ("text", "text_pair") if role in example.fields}
    return {**texts, "label": best, "score": found[best], "probabilities": found}
