"""Language modelling on raw text: the next word of a decoder, the hidden words of an encoder.

    lm          L = -mean_t log p(x_t | x_<t)
    masked-lm   L = -mean over hidden t of log p(x_t | the rest), 15 % hidden: BERT's 80 / 10 / 10

columns   text; a .txt file has a text in each paragraph
head      none: the language model's own
batches   all texts of a split one after another, each with its end, cut into blocks; or each alone
metrics   perplexity, bits per byte (of next words), token accuracy
answer    {"text", "answer"}: how it goes on, or the text with what was hidden
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from graftune.errors import DataError
from graftune.tasks.columns import find_column
from graftune.tasks.data import Example, normalised
from graftune.tasks.settings import Columns, TaskOptions
from graftune.tasks.tables import Table
from graftune.tasks.task import Encoded, Ready, Task, register_task
from graftune.tasks.token_scores import IGNORED, token_metrics, token_sums

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from graftune.tasks.measured import Score

USUAL = ("text", "content", "document", "body", "article", "sentence", "story")


class LMOptions(TaskOptions):
    """How texts become rows."""

    blocks: bool = True
    """Whether texts are put one after another and cut into blocks of `data.max_length` tokens;
    false: each is a row, cut where it is longer."""


class MaskedLMOptions(LMOptions):
    """How texts become rows, and what is hidden."""

    masked: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """Share of the tokens that are to be told."""


@register_task
class LanguageModelling(Task):
    """The next word, by a decoder."""

    name: ClassVar[str] = "lm"
    summary: ClassVar[str] = "the next word of raw text, by a decoder"
    model_task: ClassVar[str] = "causal-lm"
    epochs: ClassVar[float] = 1
    batch_size: ClassVar[int] = 8
    max_length: ClassVar[int] = 512
    metric: ClassVar[str] = "loss"
    metrics: ClassVar[tuple[str, ...]] = ("perplexity", "bits_per_byte", "token_accuracy")
    roles: ClassVar[tuple[str, ...]] = ("text",)
    options_type: ClassVar[type[TaskOptions]] = LMOptions

    def __init__(self, options: LMOptions | None = None) -> None:
        self._options = options or LMOptions()

    @property
    def options(self) -> LMOptions:
        """See `Task.options`."""
        return self._options

    def columns(self, table: Table, named: Columns) -> dict[str, str]:
        """Returns the column of the text."""
        return {"text": str(find_column(table, "text", named.text, USUAL))}

    def examples(self, table: Table, columns: Mapping[str, str]) -> list[Example]:
        """Returns each row's text.

        Raises:
            DataError: It is empty or no text.
        """
        return [
            _example(row, columns["text"], table.where(index))
            for index, row in enumerate(table.rows)
        ]

    def question(self, row: str | Mapping[str, Any], where: str) -> Example:
        """Returns a text, or a row's."""
        row = {"text": row} if isinstance(row, str) else row
        column = str(find_column(Table([dict(row)], where), "text", None, USUAL))
        return _example(row, column, where)

    def labels(self, splits: Mapping[str, Sequence[Example]]) -> list[str]:
        """Returns no labels: an answer is any text."""
        return []

    def prepare(self, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """Changes nothing.

        Raises:
            DataError: It has no end token, which tells texts apart.
        """
        if tokenizer.eos_token_id is None:
            raise DataError(
                "The base's tokenizer has no end token, which tells one text from the next: set "
                "tokenizer.eos_token, save the tokenizer and use that folder."
            )
        return []

    def encode(self, examples: Sequence[Example], ready: Ready) -> Encoded:
        """Returns blocks of all texts, or each text, as tokens that are labels as well.

        The last block is shorter than the others; nothing is left out.
        """
        texts = self._tokens([example.fields["text"] for example in examples], ready)
        limit, lengths = ready.max_length, [len(ids) for ids in texts]
        if self._options.blocks:
            stream = [token for ids in texts for token in ids]
            rows = [stream[first : first + limit] for first in range(0, len(stream), limit)]
            rows = [row for row in rows if len(row) > 1] or rows
            note = f"{len(texts):,} texts of {len(stream):,} tokens make {len(rows):,} blocks."
            cut = 0
        else:
            rows, cut = [ids[:limit] for ids in texts], sum(length > limit for length in lengths)
            note = f"{cut} of {len(rows)} texts were cut to {limit} tokens." if cut else ""
        features = [{"input_ids": row, "labels": row} for row in rows]
        return Encoded(features, lengths, [note] * bool(note), cut)

    def summarise(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Returns each row's summed loss, predicted tokens and right tokens `(rows, 3)`."""
        return token_sums(logits[:, :-1], labels[:, 1:])

    def score(self, summaries: Any, labels: Any) -> dict[str, float]:
        """Returns perplexity and token accuracy over all rows' tokens."""
        return token_metrics(summaries)

    def scorer(self, examples: Sequence[Example], encoded: Encoded, ready: Ready) -> Score:
        """Returns what adds bits per byte: nats a token / ln 2 / (UTF-8 bytes a token of texts)."""
        size = sum(len(example.fields["text"].encode()) for example in examples)
        tokens = sum(encoded.lengths)

        def score(summaries: Any, labels: Any) -> dict[str, float]:
            loss, count, _ = (float(total) for total in summaries.sum(axis=0))
            bits = loss / max(count, 1) / math.log(2) * tokens / max(size, 1)
            return {**self.score(summaries, labels), "bits_per_byte": bits}

        return score

    def answer(
        self, examples: Sequence[Example], ready: Ready, *, batch_size: int, max_new_tokens: int
    ) -> list[dict[str, Any]]:
        """Returns how the model goes on with each text (greedy)."""
        import torch

        from graftune.tasks.batches import batches_of_like_length

        model: Any = ready.model
        tokenizer: Any = ready.tokenizer
        room = max(1, ready.max_length - max_new_tokens)
        ids = tokenizer([example.fields["text"] for example in examples])["input_ids"]
        end = tokenizer.eos_token_id
        rows = [{"input_ids": (one[:-1] if one[-1:] == [end] else one)[-room:]} for one in ids]
        answers: list[dict[str, Any]] = [{} for _ in rows]
        for indices, batch in batches_of_like_length(rows, ready, batch_size, side="left"):
            with torch.inference_mode():
                said = model.generate(
                    **batch, max_new_tokens=max_new_tokens, do_sample=False,
                    pad_token_id=tokenizer.pad_token_id,
                )  # fmt: skip
            new = said[:, batch["input_ids"].shape[1] :]
            for index, text in zip(
                indices, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True
            ):
                answers[index] = {"text": examples[index].fields["text"], "answer": text}
        return answers

    def _tokens(self, texts: list[str], ready: Ready) -> list[list[int]]:
        """Returns each text's tokens with the end token after it."""
        tokenizer: Any = ready.tokenizer
        end = tokenizer.eos_token_id
        found: list[list[int]] = tokenizer(texts, verbose=False)["input_ids"]
        return [ids if ids[-1:] == [end] else [*ids, end] for ids in found]


@register_task
class MaskedLanguageModelling(LanguageModelling):
    """What was hidden in a text, by an encoder."""

    name: ClassVar[str] = "masked-lm"
    summary: ClassVar[str] = "hidden words of raw text, by an encoder"
    model_task: ClassVar[str] = "masked-lm"
    epochs: ClassVar[float] = 3
    metrics: ClassVar[tuple[str, ...]] = ("perplexity", "token_accuracy")
    options_type: ClassVar[type[TaskOptions]] = MaskedLMOptions

    def __init__(self, options: MaskedLMOptions | None = None) -> None:
        self._masked = options or MaskedLMOptions()
        super().__init__(self._masked)

    def prepare(self, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """Changes nothing.

        Raises:
            DataError: It has no mask token.
        """
        if tokenizer.mask_token_id is None:
            raise DataError(
                "The base's tokenizer has no mask token, so nothing can be hidden: take an encoder "
                'such as BERT, or the task "lm".'
            )
        return []

    def collate(self, ready: Ready) -> Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]:
        """Returns what hides tokens: others in each training pass, the same ones when measuring."""
        import torch
        from transformers import DataCollatorForLanguageModeling

        share = self._masked.masked
        hide = DataCollatorForLanguageModeling(ready.tokenizer, mlm_probability=share)

        def together(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
            own = [{"input_ids": list(row["input_ids"])} for row in rows]
            if ready.model.training:
                batch = dict(hide(own))
            else:
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(0)
                    batch = dict(hide(own))
            if not bool((batch["labels"] != IGNORED).any()):  # a loss of nothing isn't a number
                at = 1 if batch["input_ids"].shape[1] > 1 else 0
                batch["labels"][:, at] = batch["input_ids"][:, at]
                batch["input_ids"][:, at] = ready.tokenizer.mask_token_id
            return batch

        return together

    def summarise(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Returns each row's summed loss, hidden tokens and right tokens `(rows, 3)`."""
        return token_sums(logits, labels)

    def scorer(self, examples: Sequence[Example], encoded: Encoded, ready: Ready) -> Score:
        """Returns `score`: a part of the tokens says nothing of all bytes."""
        return self.score

    def answer(
        self, examples: Sequence[Example], ready: Ready, *, batch_size: int, max_new_tokens: int
    ) -> list[dict[str, Any]]:
        """Returns each text with its mask tokens filled in."""
        import torch

        from graftune.tasks.batches import batches_of_like_length

        tokenizer: Any = ready.tokenizer
        mask = tokenizer.mask_token_id
        texts = [example.fields["text"] for example in examples]
        ids = tokenizer(texts, truncation=True, max_length=ready.max_length)["input_ids"]
        rows = [{"input_ids": one} for one in ids]
        answers: list[dict[str, Any]] = [{} for _ in rows]
        for indices, batch in batches_of_like_length(rows, ready, batch_size):
            with torch.inference_mode():
                said = ready.model(**batch).logits.argmax(-1)
            filled = torch.where(batch["input_ids"] == mask, said, batch["input_ids"])
            kept = [row[at.bool()] for row, at in zip(filled, batch["attention_mask"], strict=True)]
            for index, row in zip(indices, kept, strict=True):
                text = tokenizer.decode(row, skip_special_tokens=True)
                answers[index] = {"text": texts[index], "answer": text}
        return answers

    def _tokens(self, texts: list[str], ready: Ready) -> list[list[int]]:
        """Returns each text's tokens with the special ones around it."""
        tokenizer: Any = ready.tokenizer
        return tokenizer(texts, verbose=False)["input_ids"]


def _example(row: Mapping[str, Any], column: str, where: str) -> Example:
    value = row.get(column)
    if not isinstance(value, str):
        raise DataError(f'{where}: "{column}" is {value!r}, expected a text.')
    if not value.strip():
        raise DataError(f'{where}: the text ("{column}") is empty.')
    return Example({"text": value}, normalised(value), "", where)
