"""Classification of texts or pairs of texts: one label for each row.

columns   text (and text_pair), label
head      the model class's own, newly initialised, trained with the adapter
batches   padded to the longest text in each
metrics   accuracy, macro F1, Matthews' correlation
answer    {"text", "label", "score", "probabilities": {label: p}}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from sys import intern
from typing import TYPE_CHECKING, Any, ClassVar

from graftune.errors import DataError, nearest
from graftune.tasks import metrics
from graftune.tasks.class_weights import ClassificationOptions, weighted, weights_of
from graftune.tasks.columns import find_column
from graftune.tasks.data import Example, normalised
from graftune.tasks.label_notes import label_of
from graftune.tasks.settings import Columns, TaskOptions
from graftune.tasks.tables import Row, Table
from graftune.tasks.task import Encoded, Ready, Task, cut_note, register_task

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

PAIRS = (
    ("text", "text_pair"),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("text1", "text2"),
    ("text_a", "text_b"),
)
TEXTS = (
    *("text", "sentence", "message", "utterance", "query", "review", "content", "body"),
    *("question", "comment", "title"),
)
LABELS = ("label", "labels", "intent", "category", "class", "target", "sentiment", "topic")


@register_task
class Classification(Task):
    """One of a fixed set of labels for a text or a pair of texts."""

    name: ClassVar[str] = "classification"
    summary: ClassVar[str] = "one label for a text or a pair of texts"
    model_task: ClassVar[str] = "classification"
    epochs: ClassVar[float] = 10
    batch_size: ClassVar[int] = 16
    max_length: ClassVar[int] = 512
    metric: ClassVar[str] = "accuracy"
    metrics: ClassVar[tuple[str, ...]] = ("accuracy", "macro_f1", "mcc")
    roles: ClassVar[tuple[str, ...]] = ("text", "text_pair", "label")
    picks: ClassVar[bool] = True
    options_type: ClassVar[type[TaskOptions]] = ClassificationOptions

    def __init__(self, options: ClassificationOptions | None = None) -> None:
        self._options = options or ClassificationOptions()
        self._weights: list[float] | None = None

    @property
    def options(self) -> TaskOptions:
        """See `Task.options`."""
        return self._options

    @property
    def has_own_forward(self) -> bool:
        """See `Task.has_own_forward`: where classes have weights the loss is the task's."""
        own = type(self).forward is not Classification.forward
        return own or self._options.class_weights is not None

    def forward(self, model: Any, batch: dict[str, Any]) -> Mapping[str, Any]:
        """See `Task.forward`; the loss is weighted where classes have weights."""
        if self._weights is None:
            return super().forward(model, batch)
        return weighted(model, batch, self._weights)

    def columns(self, table: Table, named: Columns) -> dict[str, str]:
        """Returns the columns of text, text_pair (for pairs) and label."""
        found = text_columns(table, named)
        label = find_column(table, "label", named.label, LABELS)
        return {**found, "label": str(label)}

    def examples(self, table: Table, columns: Mapping[str, str]) -> list[Example]:
        """Returns each row's text(s) and label.

        Raises:
            DataError: A text is empty or no text; a label is missing.
        """
        return [_labelled(row, columns, table.where(index)) for index, row in enumerate(table.rows)]

    def question(self, row: str | Mapping[str, Any], where: str) -> Example:
        """Returns a text, or a row with `text` (and `text_pair`) or other usual names."""
        if isinstance(row, str):
            row = {"text": row}
        table = Table([dict(row)], where)
        fields = texts_of(row, text_columns(table, Columns()), where)
        return Example(fields, text_key(fields), "", where)

    def labels(self, splits: Mapping[str, Sequence[Example]]) -> list[str]:
        """Returns the labels of the training data, numbers by size, names by alphabet.

        Raises:
            DataError: There is only one; or another split has a label that training never sees.
            SettingsError: A weight is for something else.
        """
        names = class_names(splits)
        chosen = self._options.class_weights
        if chosen is not None:
            strata = [example.stratum for example in splits["train"]]
            self._weights = weights_of(chosen, names, strata)
        return names

    def prepare(self, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """Changes nothing: any tokenizer will do."""
        return []

    def encode(self, examples: Sequence[Example], ready: Ready) -> Encoded:
        """Returns each text as tokens, cut to the limit, with its label's number."""
        number = {label: index for index, label in enumerate(ready.labels)}
        lengths, rows = text_tokens(examples, ready)
        for row, example in zip(rows, examples, strict=True):
            if example.stratum:
                row["labels"] = number[example.stratum]
        return Encoded(rows, lengths, cut_note(lengths, ready.max_length))

    def summarise(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Returns the predicted class of each row of logits `(batch, classes)`."""
        return logits.argmax(dim=-1)

    def score(self, summaries: Any, labels: Any) -> dict[str, float]:
        """Returns accuracy, macro F1 and MCC of predicted classes."""
        counts = metrics.confusion(labels, summaries, int(max(labels.max(), summaries.max())) + 1)
        return {
            "accuracy": metrics.accuracy(counts),
            "macro_f1": metrics.macro_f1(counts),
            "mcc": metrics.matthews(counts),
        }

    def answer(
        self, examples: Sequence[Example], ready: Ready, *, batch_size: int, max_new_tokens: int
    ) -> list[dict[str, Any]]:
        """Returns each text with its likeliest label, that label's probability, and all of them."""
        import torch

        logits = logits_of(examples, ready, batch_size)
        chances = torch.softmax(logits, dim=-1).tolist()
        return [
            _answer(example, row, ready.labels)
            for example, row in zip(examples, chances, strict=True)
        ]


def class_names(splits: Mapping[str, Sequence[Example]]) -> list[str]:
    """Returns the labels of the training data, as `Task.labels` does."""
    found = {example.stratum for example in splits["train"]}
    if len(found) < 2:
        raise DataError(
            f'All {len(splits["train"])} training rows have the label "{found.pop()}": '
            "there must be two labels or more."
        )
    for split in ("validation", "test"):
        for example in splits.get(split, ()):
            if example.stratum not in found:
                raise DataError(
                    f'{example.where}: the {split} label "{example.stratum}" never occurs in '
                    f"the training data.{nearest(example.stratum, found)}"
                )
    return sorted(found, key=label_order)


def text_columns(table: Table, named: Columns) -> dict[str, str]:
    """Returns the column of the text, or those of a pair. Raises DataError where there is none."""
    text, pair = named.text, named.text_pair
    if text is None and pair is None:
        text, pair = usual_pair(table)
    found = {
        "text": find_column(table, "text", text, TEXTS),
        "text_pair": find_column(table, "text_pair", pair, (), required=False),
    }
    return {role: column for role, column in found.items() if column is not None}


def usual_pair(table: Table) -> tuple[str | None, str | None]:
    """Returns the columns of a pair of texts where they have usual names, else None twice."""
    lower = {column.lower(): column for column in table.columns}
    for text, pair in PAIRS:
        if text in lower and pair in lower:
            return lower[text], lower[pair]
    return None, None


def _labelled(row: Row, columns: Mapping[str, str], where: str) -> Example:
    fields = texts_of(row, columns, where)
    value = row.get(columns["label"])
    if isinstance(value, list | dict):
        raise DataError(
            f'{where}: the label ("{columns["label"]}") is {value!r}, expected one name.'
        )
    label = label_of(value)
    if not label:
        raise DataError(f'{where}: the label ("{columns["label"]}") is missing, found {value!r}.')
    label = intern(label)  # one text for all rows of it
    return Example({**fields, "label": label}, text_key(fields), label, where)


def texts_of(row: Mapping[str, Any], columns: Mapping[str, str], where: str) -> dict[str, str]:
    """Returns a row's text, and the second of a pair. Raises DataError where one is missing."""
    texts: dict[str, str] = {}
    for role in ("text", "text_pair"):
        if role not in columns:
            continue
        value = row.get(columns[role])
        if not isinstance(value, str):
            raise DataError(f'{where}: "{columns[role]}" is {value!r}, expected a text.')
        if not value.strip():
            raise DataError(f'{where}: the text ("{columns[role]}") is empty.')
        texts[role] = value
    return texts


def text_key(fields: Mapping[str, str]) -> str:
    """Returns what makes two examples the same."""
    return "\x1f".join(normalised(fields[role]) for role in ("text", "text_pair") if role in fields)


def label_order(label: str) -> tuple[float, str]:
    """Returns what labels are sorted by: numbers by size, names by alphabet."""
    return (float(label), "") if label.lstrip("-").isdecimal() else (float("inf"), label)


def text_tokens(
    examples: Sequence[Example], ready: Ready
) -> tuple[list[int], list[dict[str, Any]]]:
    """Returns each example's whole length in tokens, and its tokens cut to the limit."""
    texts = [example.fields["text"] for example in examples]
    paired = all("text_pair" in example.fields for example in examples)
    second: Any = [example.fields["text_pair"] for example in examples] if paired else None
    whole = ready.tokenizer(texts, second, verbose=False)
    lengths = [len(ids) for ids in whole["input_ids"]]
    if max(lengths) > ready.max_length:
        whole = ready.tokenizer(texts, second, truncation=True, max_length=ready.max_length)
    keys = [key for key in whole if key != "attention_mask"]
    return lengths, [{key: whole[key][index] for key in keys} for index in range(len(texts))]


def logits_of(examples: Sequence[Example], ready: Ready, batch_size: int) -> Tensor:
    """Returns the head's outputs for each text `(texts, outputs)`, in their order, as float32."""
    import torch

    from graftune.tasks.batches import batches_of_like_length

    _, rows = text_tokens(examples, ready)
    found: list[Tensor] = [torch.empty(0)] * len(rows)
    for indices, batch in batches_of_like_length(rows, ready, batch_size):
        with torch.inference_mode():
            logits = ready.model(**batch).logits.float().cpu()
        for index, row in zip(indices, logits, strict=True):
            found[index] = row
    return torch.stack(found)


def texts_in(example: Example) -> dict[str, str]:
    """Returns an example's text, or both of a pair, by role."""
    return {role: example.fields[role] for role in ("text", "text_pair") if role in example.fields}


def _answer(example: Example, chances: Sequence[float], labels: Sequence[str]) -> dict[str, Any]:
    best = max(range(len(chances)), key=chances.__getitem__)
    return {
        **texts_in(example),
        "label": labels[best],
        "score": chances[best],
        "probabilities": dict(zip(labels, chances, strict=True)),
    }
