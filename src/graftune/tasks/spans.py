"""Extractive question answering: the part of a passage that answers a question.

columns   question, context, answers (texts, with `answer_start` or searched); SQuAD's JSON
head      the model class's own for starts and ends, newly initialised, trained with the adapter
batches   long passages in overlapping windows, padded to the longest in each
metrics   exact match and F1 as SQuAD defines them
answer    {"question", "answer", "start", "end", "score", "best": [the same of other spans]}
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

from pydantic import Field

from graftune.errors import DataError
from graftune.tasks.columns import find_column
from graftune.tasks.data import Example, normalised
from graftune.tasks.labelling import check_fast
from graftune.tasks.settings import Columns, Count, TaskOptions
from graftune.tasks.squad import answer_scores, row_scores
from graftune.tasks.tables import Row, Table
from graftune.tasks.task import Encoded, Ready, Task, register_task

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from graftune.tasks.measured import Measured, Score
    from graftune.tasks.windows import Span, Window

QUESTIONS = ("question", "query")
PASSAGES = ("context", "passage", "paragraph", "document", "text")
ANSWERS = ("answers", "answer")
_NONE_GIVEN = (None, "", [], {})


class SpanOptions(TaskOptions):
    """How passages are read."""

    no_answer: bool = False
    """Whether a passage may hold no answer (SQuAD 2), and "" be the right one."""
    stride: int = Field(default=128, ge=0)
    """Tokens that two windows of a long passage share."""
    longest: Count = 30
    """Tokens of an answer at most."""
    best: Count = 5
    """Answers that a prediction lists."""


@register_task
class Spans(Task):
    """The part of a passage that answers a question."""

    name: ClassVar[str] = "spans"
    summary: ClassVar[str] = "the part of a passage that answers a question (SQuAD)"
    model_task: ClassVar[str] = "question-answering"
    epochs: ClassVar[float] = 3
    batch_size: ClassVar[int] = 16
    max_length: ClassVar[int] = 384
    metric: ClassVar[str] = "f1"
    metrics: ClassVar[tuple[str, ...]] = ("exact_match", "f1")
    roles: ClassVar[tuple[str, ...]] = ("question", "context", "answer")
    answers_all: ClassVar[bool] = True
    options_type: ClassVar[type[TaskOptions]] = SpanOptions

    def __init__(self, options: SpanOptions | None = None) -> None:
        self._options = options or SpanOptions()

    @property
    def options(self) -> SpanOptions:
        """See `Task.options`."""
        return self._options

    def columns(self, table: Table, named: Columns) -> dict[str, str]:
        """Returns the columns of question, context and answer."""
        return {
            **_asked(table, named),
            "answer": str(find_column(table, "answer", named.answer, ANSWERS)),
        }

    def examples(self, table: Table, columns: Mapping[str, str]) -> list[Example]:
        """Returns each row's question, passage and answers, and where the first one begins.

        Raises:
            DataError: A text is missing, an answer isn't where `answer_start` says, or there is
                none where `no_answer` isn't set.
        """
        return [
            self._answered(row, columns, table.where(index)) for index, row in enumerate(table.rows)
        ]

    def _answered(self, row: Row, columns: Mapping[str, str], where: str) -> Example:
        asked = _example(row, columns, where)
        given = [] if row.get("is_impossible") else _answers(row.get(columns["answer"]), where)
        if not given and not self._options.no_answer:
            raise DataError(
                f"{where}: there is no answer; if passages may hold none, set "
                "task_options.no_answer: true."
            )
        context = asked.fields["context"]
        placed = [(text, _place(text, start, context, where)) for text, start in given]
        placed.sort(key=lambda one: one[1] is None)
        fields = {
            **asked.fields,
            "answers": [text for text, _ in placed],
            "start": placed[0][1] if placed else None,
        }
        return Example(fields, asked.key, "", where)

    def question(self, row: str | Mapping[str, Any], where: str) -> Example:
        """Returns a row with question and passage under usual names.

        Raises:
            DataError: It is a text alone.
        """
        if isinstance(row, str):
            raise DataError(
                f'{where} is a text alone: give rows with "question" and "context", as in --data '
                "FILE."
            )
        return _example(row, _asked(Table([dict(row)], where), Columns()), where)

    def labels(self, splits: Mapping[str, Sequence[Example]]) -> list[str]:
        """Returns no labels.

        Raises:
            DataError: No training row's answer is in its passage.
        """
        if not any(_teaches(one) for one in splits["train"]):
            raise DataError(
                f"None of the {len(splits['train'])} training passages holds its answer."
            )
        return []

    def remarks(self, examples: Sequence[Example]) -> list[str]:
        """Returns how many passages don't hold their answer, if any."""
        missing = [example.where for example in examples if not _teaches(example)]
        if not missing:
            return []
        return [
            f"{len(missing)} of {len(examples)} passages don't hold their answer (the first is "
            f"{missing[0]}): nothing is learnt from them."
        ]

    def prepare(self, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """Changes nothing.

        Raises:
            DataError: The tokenizer can't tell where in the passage a token lies.
        """
        check_fast(tokenizer, self.name)
        return []

    def encode(self, examples: Sequence[Example], ready: Ready) -> Encoded:
        """Returns the windows of the rows whose answer is known, labelled with its two ends.

        Raises:
            DataError: A question leaves no room for its passage.
        """
        from graftune.tasks.windows import labelled, windows_of

        windows = windows_of(examples, ready, self._options.stride)
        encoded = Encoded(lengths=[0] * len(examples), cut=0)
        counts = Counter(window.row for window in windows)
        for window in windows:
            encoded.lengths[window.row] += len(window.features["input_ids"])
        parted = sum(count > 1 for count in counts.values())
        if parted:
            encoded.notes.append(
                f"{parted} of {len(examples)} passages and their questions have more than "
                f"{ready.max_length} tokens and are read in windows, {len(windows)} in all."
            )
        encoded.features = [
            labelled(window, examples[window.row].fields)
            for window in windows
            if _teaches(examples[window.row])
        ]
        return encoded

    def forward(self, model: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Returns the logits of starts and ends, `(windows, tokens, 2)`, and with labels the loss.

        The loss is the mean of the two ends' cross-entropies over the window's tokens.
        """
        import torch

        out = model(**{key: value for key, value in batch.items() if key != "labels"})
        logits = torch.stack([out.start_logits, out.end_logits], dim=-1)
        if "labels" not in batch:
            return {"logits": logits}
        padding = batch["attention_mask"][..., None] == 0
        shown = logits.float().masked_fill(padding, torch.finfo(torch.float32).min)
        loss = torch.nn.functional.cross_entropy(shown, batch["labels"])
        return {"loss": loss, "logits": logits}

    def inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Returns a batch as the model's own forward takes it."""
        kept = {key: value for key, value in batch.items() if key != "labels"}
        starts, ends = batch["labels"].unbind(dim=-1)
        return {**kept, "start_positions": starts, "end_positions": ends}

    def summarise(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Returns the logits, all of which count."""
        return logits.float()

    def scorer(self, examples: Sequence[Example], encoded: Encoded, ready: Ready) -> Score:
        """Returns what puts the windows of each row together."""
        from graftune.tasks.windows import windows_of

        taught = [example for example in examples if _teaches(example)]
        windows = windows_of(taught, ready, self._options.stride) if taught else []
        right = [example.fields["answers"] for example in taught]

        def score(summaries: Any, labels: Any) -> dict[str, float]:
            found = self._answers(taught, windows, list(summaries))
            return self.score([one["answer"] for one in found], right)

        return score

    def score(self, summaries: Any, labels: Any) -> dict[str, float]:
        """Returns exact match and F1 of answers against lists of right ones."""
        return answer_scores(summaries, labels)

    def answer(
        self, examples: Sequence[Example], ready: Ready, *, batch_size: int, max_new_tokens: int
    ) -> list[dict[str, Any]]:
        """Returns each question with its likeliest answer, where that lies, and others."""
        import torch

        from graftune.tasks.batches import batches_of_like_length
        from graftune.tasks.windows import windows_of

        windows = windows_of(examples, ready, self._options.stride)
        rows = [window.features for window in windows]
        logits: list[Any] = [None] * len(rows)
        for indices, batch in batches_of_like_length(rows, ready, batch_size):
            with torch.inference_mode():
                found = self.forward(ready.model, batch)["logits"].float().cpu().numpy()
            for index, values in zip(indices, found, strict=True):
                logits[index] = values
        return self._answers(examples, windows, logits)

    def _answers(
        self, examples: Sequence[Example], windows: Sequence[Window], logits: Sequence[Any]
    ) -> list[dict[str, Any]]:
        from graftune.tasks.windows import of_rows

        options = self._options
        found = of_rows(windows, logits, len(examples), options.longest, options.best)
        return [
            _answer(example, spans, nowhere if options.no_answer else None)
            for example, (spans, nowhere) in zip(examples, found, strict=True)
        ]

    def measure(
        self,
        examples: Sequence[Example],
        answers: Sequence[Mapping[str, Any]],
        labels: Sequence[str],
    ) -> Measured:
        """See `Task.measure`."""
        from graftune.tasks.measured import Measured

        said = [one["answer"] for one in answers]
        right = [one.fields["answers"] for one in examples]
        return Measured(self.score(said, right), [], rows=row_scores(said, right))

    def truth(self, example: Example) -> dict[str, Any]:
        """Returns the right answers."""
        return {"true": example.fields["answers"]}


def _asked(table: Table, named: Columns) -> dict[str, str]:
    return {
        "question": str(find_column(table, "question", named.question, QUESTIONS)),
        "context": str(find_column(table, "context", named.context, PASSAGES)),
    }


def _example(row: Mapping[str, Any], columns: Mapping[str, str], where: str) -> Example:
    fields: dict[str, Any] = {}
    for role in ("question", "context"):
        value = row.get(columns[role])
        if not isinstance(value, str) or not value.strip():
            raise DataError(f'{where}: the {role} ("{columns[role]}") is {value!r:.80}, no text.')
        fields[role] = value
    key = "\x1f".join(normalised(text) for text in fields.values())
    return Example(fields, key, "", where)


def _teaches(example: Example) -> bool:
    """Whether it is known where a row's answer lies, or that there is none."""
    return example.fields["start"] is not None or not example.fields["answers"]


def _answers(value: Any, where: str) -> list[tuple[str, int | None]]:
    """Returns the texts and beginnings of the answers that a row gives, in any of the usual forms.

    Raises:
        DataError: It is another form.
    """
    if value in _NONE_GIVEN:
        return []
    if isinstance(value, Mapping):
        given = cast(Mapping[str, Any], value)
        texts, starts = given.get("text"), given.get("answer_start")
        if not isinstance(texts, list):
            return _answers([value], where)
        many = cast(list[Any], texts)
        places = cast(list[Any], starts) if isinstance(starts, list) else [None] * len(many)
        if len(places) != len(many):
            raise DataError(
                f"{where}: there are {len(many)} answers and {len(places)} answer_start."
            )
        return [_one(text, start, where) for text, start in zip(many, places, strict=True)]
    items = cast(list[Any], value) if isinstance(value, list) else [value]
    return [
        _one(item.get("text"), item.get("answer_start"), where)
        if isinstance(item, Mapping)
        else _one(item, None, where)
        for item in items
    ]


def _one(text: Any, start: Any, where: str) -> tuple[str, int | None]:
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{where}: an answer is {text!r:.80}, expected a text.")
    if start is not None and (not isinstance(start, int) or start < 0):
        raise DataError(f"{where}: answer_start is {start!r}, expected a number of characters.")
    return text, start


def _place(text: str, start: int | None, context: str, where: str) -> int | None:
    """Returns where an answer begins, None if the passage doesn't hold it.

    Raises:
        DataError: It begins elsewhere than it is said to.
    """
    if start is not None and context.startswith(text, start):
        return start
    found = context.find(text)
    if found < 0:
        return None
    if start is not None:
        there = context[start : start + len(text)]
        raise DataError(
            f'{where}: the answer "{text}" isn\'t at answer_start {start}, where the passage has '
            f'"{there}", but at {found} (characters from 0); mend it, or leave answer_start out.'
        )
    return found


def _answer(example: Example, spans: Sequence[Span], nowhere: float | None) -> dict[str, Any]:
    """Returns a question's answer; `nowhere` is the score of none, where that may be."""
    from graftune.tasks.windows import chances

    context = example.fields["context"]
    found: list[dict[str, Any]] = []
    for span in spans:
        text = context[span.start : span.end]
        start = span.start + len(text) - len(text.lstrip())
        found.append({"answer": text.strip(), "start": start, "end": start + len(text.strip())})
    scores = [span.score for span in spans]
    if nowhere is not None or not found:
        found.append({"answer": "", "start": None, "end": None})
        scores.append(nowhere or 0.0)
    for one, chance in zip(found, chances(scores), strict=True):
        one["score"] = chance
    best = sorted(found, key=lambda one: -one["score"])
    return {"question": example.fields["question"], **best[0], "best": best}
