"""Multiple choice by a head: an encoder reads the text with each choice and gives it one number.

    logits = (s_1, …, s_C),  s_c = w · pooled(text, choice c) + b
    L = -log softmax(logits) of the right choice

columns   text (and text_pair), choices and label, as for `choices`, which asks a language model
head      the model class's own, one output for each choice, newly initialised, trained
batches   (rows, choices, tokens), padded in both; what is no choice can't be chosen
metrics   accuracy
answer    {"text", "label", "score", "probabilities": {choice: p}}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch.nn import functional

from graftune.errors import DataError
from graftune.tasks.choices import Choices, texts_in
from graftune.tasks.data import Example
from graftune.tasks.settings import TaskOptions
from graftune.tasks.task import Encoded, Ready, cut_note, register_task
from graftune.training.lengths import PadToLongest

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


@register_task
class MultipleChoice(Choices):
    """The best of several answers, which an encoder's head scores one by one."""

    name: ClassVar[str] = "multiple-choice"
    summary: ClassVar[str] = "the best of several answers, by an encoder's head"
    model_task: ClassVar[str] = "multiple-choice"
    options_type: ClassVar[type[TaskOptions]] = TaskOptions

    def __init__(self, options: TaskOptions | None = None) -> None:
        super().__init__()
        self._own = options or TaskOptions()

    @property
    def options(self) -> Any:
        """See `Task.options`."""
        return self._own

    def prepare(self, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """Changes nothing: any tokenizer will do."""
        return []

    def encode(self, examples: Sequence[Example], ready: Ready) -> Encoded:
        """Returns the tokens of each text with each of its choices, and the right one's number.

        Raises:
            DataError: There is nothing to choose from, or no room for a text beside a choice.
        """
        encoded = Encoded()
        for example in examples:
            names = list(example.fields.get("choices") or ready.labels)
            if not names:
                raise DataError(f"{example.where}: give the choices, a list, beside the text.")
            found = _pairs("\n".join(texts_in(example)), names, ready, example.where)
            encoded.lengths.append(found.pop("length"))
            row: dict[str, Any] = {"input_ids": max(found["choices"], key=len), **found}
            if "answer" in example.fields:
                row["labels"] = names.index(example.fields["answer"])
            encoded.features.append(row)
        encoded.notes = cut_note(encoded.lengths, ready.max_length)
        return encoded

    def collate(self, ready: Ready) -> Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]:
        """Returns what pads rows to (rows, choices, tokens), and tells the choices there are."""
        token: Any = ready.tokenizer.pad_token_id
        pad = PadToLongest(int(token or 0))

        def together(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
            most = max(len(row["choices"]) for row in rows)
            flat: list[dict[str, Any]] = []
            for row in rows:
                own = [
                    {"input_ids": ids, **({"token_type_ids": kinds} if kinds else {})}
                    for ids, kinds in zip(row["choices"], row["kinds"], strict=True)
                ]
                flat += own + own[:1] * (most - len(own))
            batch = {
                name: tensor.reshape(len(rows), most, -1) for name, tensor in pad(flat).items()
            }
            counts = torch.tensor([len(row["choices"]) for row in rows])
            batch["present"] = torch.arange(most) < counts[:, None]
            if "labels" in rows[0]:
                batch["labels"] = torch.tensor([row["labels"] for row in rows])
            return batch

        return together

    def forward(self, model: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Returns the score of each choice, `logits` `(rows, choices)`, and with labels the loss.

        What isn't a choice has the least logit there is.
        """
        own = {key: batch[key] for key in batch if key not in ("present", "labels")}
        logits = model(**own).logits.float()
        logits = logits.masked_fill(~batch["present"], torch.finfo(logits.dtype).min)
        if "labels" not in batch:
            return {"logits": logits}
        return {"loss": functional.cross_entropy(logits, batch["labels"]), "logits": logits}

    def inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        """See `Task.inputs`; a row's missing choices are its first one again."""
        return {key: value for key, value in batch.items() if key != "present"}


def _pairs(text: str, names: Sequence[str], ready: Ready, where: str) -> dict[str, Any]:
    """Returns the tokens of a text with each choice, the text cut where both are too long."""
    tokenizer: Any = ready.tokenizer
    many = [text] * len(names)
    whole = tokenizer(many, list(names), verbose=False)["input_ids"]
    alone = max(len(ids) for ids in tokenizer([""] * len(names), list(names))["input_ids"])
    if alone >= ready.max_length:
        raise DataError(
            f"{where}: a choice has {alone} tokens, but a text and its choice may have "
            f"{ready.max_length} in all (data.max_length)."
        )
    cut = tokenizer(many, list(names), truncation="only_first", max_length=ready.max_length)
    kinds = cut.get("token_type_ids") or [None] * len(names)
    return {"length": max(map(len, whole)), "choices": cut["input_ids"], "kinds": kinds}
