"""Sentence vectors: what belongs together comes to lie together, and everything else apart.

    v(x) = mean over the tokens of x of the last states, divided by its length
    L = -log( exp(v_i · v_i⁺ / t) / Σ_j exp(v_i · c_j / t) )    c: all positives and negatives

InfoNCE with the batch's other rows as negatives (van den Oord et al., 2018, arXiv:1807.03748; the
temperature t of Gao et al., 2021, arXiv:2104.08821). What is the same text as row i's positive, or
belongs to the same text as row i, is no negative of it.

columns   text and text_pair (anchor, positive), and negative where there is one in each row
head      none: the base's own last states
batches   all texts of all rows in one forward pass, padded to the longest
metrics   accuracy@1 and mean reciprocal rank of a row's partner among those of all rows
answer    {"text", "vector"}; of a pair also {"text_pair", "similarity"}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch.nn import functional

from graftune.errors import DataError
from graftune.tasks.classification import text_key, texts_of, usual_pair
from graftune.tasks.columns import find_column
from graftune.tasks.data import Example, normalised
from graftune.tasks.settings import Columns, TaskOptions
from graftune.tasks.tables import Table
from graftune.tasks.task import Encoded, Ready, Task, cut_note, register_task
from graftune.training.lengths import PadToLongest

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

ANCHORS = ("anchor", "query", "question", "text", "sentence", "title")
POSITIVES = (
    "positive",
    "pos",
    "text_pair",
    "answer",
    "passage",
    "document",
    "response",
    "match",
    "context",
)
NEGATIVES = ("negative", "neg", "hard_negative", "non_match")
ROWS = 1024
"""Rows that are ranked at once."""


class EmbeddingOptions(TaskOptions):
    """How vectors are learnt."""

    temperature: Annotated[float, Field(gt=0)] = 0.05
    """What similarities are divided by: the smaller, the more the nearest negatives count."""


@register_task
class Embedding(Task):
    """Vectors of texts, near to those of what belongs to them."""

    name: ClassVar[str] = "embedding"
    summary: ClassVar[str] = "vectors of texts, from pairs that belong together"
    model_task: ClassVar[str] = "feature"
    epochs: ClassVar[float] = 3
    batch_size: ClassVar[int] = 32
    max_length: ClassVar[int] = 256
    metric: ClassVar[str] = "mrr"
    metrics: ClassVar[tuple[str, ...]] = ("accuracy_at_1", "mrr")
    roles: ClassVar[tuple[str, ...]] = ("text", "text_pair", "negative")
    options_type: ClassVar[type[TaskOptions]] = EmbeddingOptions

    def __init__(self, options: EmbeddingOptions | None = None) -> None:
        self._options = options or EmbeddingOptions()

    @property
    def options(self) -> EmbeddingOptions:
        """See `Task.options`."""
        return self._options

    def columns(self, table: Table, named: Columns) -> dict[str, str]:
        """Returns the columns of a pair, and of negatives if there are some."""
        text, pair = named.text, named.text_pair
        if text is None and pair is None:
            text, pair = usual_pair(table)
        found = {
            "text": find_column(table, "text", text, ANCHORS),
            "text_pair": find_column(table, "text_pair", pair, POSITIVES),
            "negative": find_column(table, "negative", named.negative, NEGATIVES, required=False),
        }
        return {role: column for role, column in found.items() if column is not None}

    def examples(self, table: Table, columns: Mapping[str, str]) -> list[Example]:
        """Returns each row's two or three texts.

        Raises:
            DataError: One is empty or no text.
        """
        return [_example(row, columns, table.where(index)) for index, row in enumerate(table.rows)]

    def question(self, row: str | Mapping[str, Any], where: str) -> Example:
        """Returns a text, or a row with one text or two."""
        row = {"text": row} if isinstance(row, str) else row
        table = Table([dict(row)], where)
        text, pair = usual_pair(table)
        found = {
            "text": find_column(table, "text", text, ANCHORS),
            "text_pair": find_column(table, "text_pair", pair, POSITIVES, required=False),
        }
        return _example(row, {role: name for role, name in found.items() if name}, where)

    def labels(self, splits: Mapping[str, Sequence[Example]]) -> list[str]:
        """Returns no labels.

        Raises:
            DataError: All rows have the same partner, so there is nothing to tell apart.
        """
        partners = {normalised(one.fields["text_pair"]) for one in splits["train"]}
        if len(partners) < 2:
            raise DataError(
                f"All {len(splits['train'])} training rows have the same text_pair: there must be "
                "two or more to tell apart."
            )
        return []

    def prepare(self, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """Lets a tokenizer without a padding token pad with its end token."""
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return []

    def encode(self, examples: Sequence[Example], ready: Ready) -> Encoded:
        """Returns the tokens of each row's texts, and which text each of its pair is."""
        tokenizer: Any = ready.tokenizer
        numbers: dict[str, int] = {}
        encoded = Encoded()
        for example in examples:
            texts = [example.fields[role] for role in self.roles if role in example.fields]
            whole = tokenizer(texts, verbose=False)["input_ids"]
            cut = tokenizer(texts, truncation=True, max_length=ready.max_length)["input_ids"]
            row: dict[str, Any] = {"input_ids": max(cut, key=len), "texts": cut}
            if len(texts) > 1:
                ids = [numbers.setdefault(normalised(text), len(numbers)) for text in texts[:2]]
                row["labels"] = ids
            encoded.features.append(row)
            encoded.lengths.append(max(map(len, whole)))
        encoded.notes = cut_note(encoded.lengths, ready.max_length)
        return encoded

    def collate(self, ready: Ready) -> Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]:
        """Returns what pads all texts of all rows together; `labels` are `(rows, 2)`."""
        token: Any = ready.tokenizer.pad_token_id
        pad = PadToLongest(int(token or 0))

        def together(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
            batch = pad([{"input_ids": ids} for row in rows for ids in row["texts"]])
            batch["rows"] = torch.tensor(len(rows))
            if "labels" in rows[0]:
                batch["labels"] = torch.tensor([row["labels"] for row in rows])
            return batch

        return together

    def forward(self, model: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Returns the vectors, `logits` `(rows, texts, width)`, and with labels the loss."""
        vectors = sentence_vectors(model, batch["input_ids"], batch["attention_mask"])
        found = vectors.reshape(int(batch["rows"]), -1, vectors.shape[-1])
        if "labels" not in batch:
            return {"logits": found}
        return {
            "loss": info_nce(found, batch["labels"], self._options.temperature),
            "logits": found,
        }

    def inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Returns a batch as the model takes it; it has no loss of its own."""
        return {key: batch[key] for key in ("input_ids", "attention_mask")}

    def summarise(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Returns each row's two vectors and the numbers of its texts, `(rows, 2 width + 2)`."""
        pairs = logits[:, :2].flatten(1).float()
        return torch.cat([pairs, labels.to(pairs)], dim=1)

    def score(self, summaries: Any, labels: Any) -> dict[str, float]:
        """Returns how often a row's partner is the nearest, and the mean of 1 / its rank."""
        ranks = ranks_of(np.asarray(summaries, np.float32))
        return {"accuracy_at_1": float((ranks == 1).mean()), "mrr": float((1 / ranks).mean())}

    def row_scores(self, summaries: Any) -> list[float]:
        """Returns 1 / the rank of each row's partner."""
        return (1 / ranks_of(np.asarray(summaries, np.float32))).tolist()

    def answer(
        self, examples: Sequence[Example], ready: Ready, *, batch_size: int, max_new_tokens: int
    ) -> list[dict[str, Any]]:
        """Returns the vector of each text, and of a pair how similar both are."""
        from graftune.tasks.batches import batches_of_like_length

        rows: list[dict[str, Any]] = [
            {"input_ids": ids, "texts": [ids], "row": index}
            for index, row in enumerate(self.encode(examples, ready).features)
            for ids in row["texts"][:2]
        ]
        vectors: list[list[float]] = [[] for _ in rows]
        collate = self.collate(ready)
        for indices, batch in batches_of_like_length(rows, ready, batch_size, collate=collate):
            with torch.inference_mode():
                found = self.forward(ready.model, batch)["logits"][:, 0].float().tolist()
            for index, vector in zip(indices, found, strict=True):
                vectors[index] = vector
        answers: list[dict[str, Any]] = [dict(example.fields) for example in examples]
        for row, vector in zip(rows, vectors, strict=True):
            answer = answers[row["row"]]
            if "vector" in answer:
                answer["similarity"] = float(np.dot(answer["vector"], vector))
            else:
                answer["vector"] = vector
        return answers


def sentence_vectors(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Returns the mean of each text's last states, divided by its length, `(texts, width)`."""
    states = model(input_ids=ids, attention_mask=mask).last_hidden_state
    kept = mask[..., None].to(states.dtype)
    return functional.normalize((states * kept).sum(1) / kept.sum(1), dim=-1)


def info_nce(vectors: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Returns the mean loss of rows.

    Args:
        vectors: `(rows, 2 or 3, width)`: anchor, positive and perhaps a negative of each.
        labels: `(rows, 2)`: equal numbers are equal texts.
        temperature: what similarities are divided by.
    """
    anchors, candidates = vectors[:, 0].float(), vectors[:, 1:].transpose(0, 1).flatten(0, 1)
    logits = anchors @ candidates.float().T / temperature
    rows = torch.arange(len(labels), device=labels.device)
    same = (labels[:, None] == labels[None]).any(-1) & (rows[:, None] != rows)
    logits[:, : len(rows)] = logits[:, : len(rows)].masked_fill(same, float("-inf"))
    return functional.cross_entropy(logits, rows)


def ranks_of(summaries: np.ndarray) -> np.ndarray:
    """Returns the rank of each row's partner: 1 and how many other texts are nearer.

    Args:
        summaries: `(rows, 2 width + 2)`, as `Embedding.summarise` gives them.
    """
    width = (summaries.shape[1] - 2) // 2
    anchors, partners = summaries[:, :width], summaries[:, width:-2]
    own, texts = summaries[:, -2], summaries[:, -1]
    ranks: list[int] = []
    for first in range(0, len(summaries), ROWS):
        part = slice(first, first + ROWS)
        near = anchors[part] @ partners.T
        right = (texts[part, None] == texts) | (own[part, None] == own)
        best = np.where(right, near, -np.inf).max(axis=1)
        nearer = (near > best[:, None]) & ~right
        ranks += [1 + _distinct(row, texts) for row in nearer]
    return np.asarray(ranks, np.float64)


def _distinct(nearer: np.ndarray, texts: np.ndarray) -> int:
    return len(np.unique(texts[nearer]))


def _example(row: Mapping[str, Any], columns: Mapping[str, str], where: str) -> Example:
    fields: dict[str, Any] = dict(texts_of(row, columns, where))
    key = text_key(fields)
    if "negative" in columns:
        value = row.get(columns["negative"])
        if not isinstance(value, str) or not value.strip():
            raise DataError(
                f'{where}: the negative ("{columns["negative"]}") is {value!r}, no text.'
            )
        fields["negative"] = value
    return Example(fields, key, "", where)
