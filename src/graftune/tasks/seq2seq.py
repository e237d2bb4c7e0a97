"""Text to text: an encoder-decoder reads one text and writes another.

    L = -mean over all target tokens y_t of log p(y_t | y_<t, source)

columns   text (the source) and answer (the target)
head      none: the language model's own
batches   sources and targets padded to the longest in each; loss on the targets, end token included
metrics   perplexity and token accuracy while it trains; of written answers ROUGE, BLEU and chrF
answer    {"text", "answer"}
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from graftune.errors import DataError, SettingsError
from graftune.tasks.classification import TEXTS
from graftune.tasks.columns import find_column
from graftune.tasks.conversations import ANSWERS, INSTRUCTIONS
from graftune.tasks.data import Example, normalised
from graftune.tasks.settings import Columns, TaskOptions
from graftune.tasks.tables import Table
from graftune.tasks.task import Encoded, Ready, Task, cut_note, register_task
from graftune.tasks.token_scores import token_metrics, token_sums

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from graftune.tasks.measured import Measured

SOURCES = ("source", "document", "article", "dialogue", "input", "src", *TEXTS, *INSTRUCTIONS)
TARGETS = ("target", "summary", "highlights", "translation", "tgt", *ANSWERS, "label")
ROUGE = (("rouge1", "rouge1"), ("rouge2", "rouge2"), ("rougeL", "rouge_l"))
"""rouge-score's names and ours."""


class Seq2SeqOptions(TaskOptions):
    """How texts are read and written."""

    prefix: str = ""
    """What is put before each source, as T5's "summarize: "."""
    max_target: Annotated[int, Field(ge=2)] = 128
    """Longest target in tokens; longer ones are cut, and counted."""
    beams: Annotated[int, Field(ge=1)] = 1
    """Beams when it writes; 1 is greedy."""


@register_task
class Seq2Seq(Task):
    """One text for another: summaries, translations, texts about data."""

    name: ClassVar[str] = "seq2seq"
    summary: ClassVar[str] = "a text for a text, by an encoder-decoder"
    model_task: ClassVar[str] = "seq2seq-lm"
    epochs: ClassVar[float] = 3
    batch_size: ClassVar[int] = 8
    max_length: ClassVar[int] = 512
    metric: ClassVar[str] = "loss"
    metrics: ClassVar[tuple[str, ...]] = ("perplexity", "token_accuracy")
    roles: ClassVar[tuple[str, ...]] = ("text", "answer")
    answers_all: ClassVar[bool] = True
    options_type: ClassVar[type[TaskOptions]] = Seq2SeqOptions

    def __init__(self, options: Seq2SeqOptions | None = None) -> None:
        self._options = options or Seq2SeqOptions()

    @property
    def options(self) -> Seq2SeqOptions:
        """See `Task.options`."""
        return self._options

    def columns(self, table: Table, named: Columns) -> dict[str, str]:
        """Returns the columns of source and target."""
        return {
            "text": str(find_column(table, "text", named.text, SOURCES)),
            "answer": str(find_column(table, "answer", named.answer, TARGETS)),
        }

    def examples(self, table: Table, columns: Mapping[str, str]) -> list[Example]:
        """Returns each row's two texts.

        Raises:
            DataError: One is empty or no text.
        """
        found: list[Example] = []
        for index, row in enumerate(table.rows):
            where = table.where(index)
            fields = {role: _text(row, columns[role], role, where) for role in self.roles}
            found.append(Example(fields, normalised(fields["text"]), "", where))
        return found

    def question(self, row: str | Mapping[str, Any], where: str) -> Example:
        """Returns a text, or a row's source."""
        row = {"text": row} if isinstance(row, str) else row
        column = str(find_column(Table([dict(row)], where), "text", None, ("text", *SOURCES)))
        text = _text(row, column, "text", where)
        return Example({"text": text}, normalised(text), "", where)

    def labels(self, splits: Mapping[str, Sequence[Example]]) -> list[str]:
        """Returns no labels: an answer is any text.

        Raises:
            SettingsError: Answers of test rows couldn't be measured, since a library is missing.
        """
        missing = [name for name in ("rouge_score", "sacrebleu") if not _is_there(name)]
        if missing and splits.get("test"):
            raise SettingsError(
                f"ROUGE and BLEU need {' and '.join(missing)}, which isn't installed: "
                'pip install "graftune[text]", or train without test rows '
                "(data.test_fraction=0)."
            )
        return []

    def prepare(self, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """Changes nothing.

        Raises:
            DataError: It has no end token, so that a trained model would never stop.
        """
        if tokenizer.eos_token_id is None:
            raise DataError(
                "The base's tokenizer has no end token, so a trained model would never stop: set "
                "tokenizer.eos_token, save the tokenizer and use that folder."
            )
        return []

    def encode(self, examples: Sequence[Example], ready: Ready) -> Encoded:
        """Returns each source and target as tokens, both cut to their limits."""
        encoded = self._sources(examples, ready)
        if examples and "answer" in examples[0].fields:
            tokenizer: Any = ready.tokenizer
            texts = [example.fields["answer"] for example in examples]
            targets = tokenizer(text_target=texts, verbose=False)["input_ids"]
            limit, end = self._options.max_target, tokenizer.eos_token_id
            for row, ids in zip(encoded.features, targets, strict=True):
                own = ids if ids[-1:] == [end] else [*ids, end]
                row["labels"] = own if len(own) <= limit else [*own[: limit - 1], end]
            long = [len(ids) for ids in targets if len(ids) > limit]
            if long:
                encoded.notes.append(
                    f"{len(long)} of {len(targets)} targets are longer than {limit} tokens (the "
                    f"longest has {max(long)}) and are cut (task_options.max_target)."
                )
        return encoded

    def summarise(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Returns each row's summed loss, target tokens and right tokens `(batch, 3)`."""
        return token_sums(logits, labels)

    def score(self, summaries: Any, labels: Any) -> dict[str, float]:
        """Returns perplexity and token accuracy over all targets' tokens."""
        return token_metrics(summaries)

    def answer(
        self, examples: Sequence[Example], ready: Ready, *, batch_size: int, max_new_tokens: int
    ) -> list[dict[str, Any]]:
        """Returns each source with what the model writes for it."""
        import torch

        from graftune.tasks.batches import batches_of_like_length

        rows = [{"input_ids": one["input_ids"]} for one in self._sources(examples, ready).features]
        answers: list[dict[str, Any]] = [{} for _ in rows]
        model: Any = ready.model
        most = min(max_new_tokens, self._options.max_target)
        for indices, batch in batches_of_like_length(rows, ready, batch_size):
            with torch.inference_mode():
                said = model.generate(
                    **batch, max_new_tokens=most, do_sample=False, num_beams=self._options.beams
                )
            texts = ready.tokenizer.batch_decode(said, skip_special_tokens=True)
            for index, text in zip(indices, texts, strict=True):
                answers[index] = {"text": examples[index].fields["text"], "answer": text.strip()}
        return answers

    def measure(
        self,
        examples: Sequence[Example],
        answers: Sequence[Mapping[str, Any]],
        labels: Sequence[str],
    ) -> Measured:
        """Returns ROUGE, BLEU and chrF of written answers."""
        from graftune.tasks.measured import Measured

        said = [str(one["answer"]) for one in answers]
        right = [str(one.fields["answer"]) for one in examples]
        rows = [row["rougeL"].fmeasure for row in _rouge(said, right)]
        return Measured(written(said, right), [], rows=rows)

    def truth(self, example: Example) -> dict[str, Any]:
        """See `Task.truth`."""
        return {"true": example.fields["answer"]}

    def _sources(self, examples: Sequence[Example], ready: Ready) -> Encoded:
        tokenizer: Any = ready.tokenizer
        texts = [self._options.prefix + example.fields["text"] for example in examples]
        lengths = [len(ids) for ids in tokenizer(texts, verbose=False)["input_ids"]]
        cut = tokenizer(texts, truncation=True, max_length=ready.max_length)["input_ids"]
        features: list[dict[str, Any]] = [{"input_ids": ids} for ids in cut]
        return Encoded(features, lengths, cut_note(lengths, ready.max_length))


def written(said: Sequence[str], right: Sequence[str]) -> dict[str, float]:
    """Returns ROUGE-1, -2 and -L (F1, stemmed, means over rows), and BLEU and chrF of all rows.

    All are shares of 1. ROUGE by rouge-score, the others by sacrebleu with its defaults.
    """
    import sacrebleu

    rows = _rouge(said, right)
    found = {name: sum(row[kind].fmeasure for row in rows) / len(rows) for kind, name in ROUGE}
    references = [list(right)]
    return found | {
        "bleu": sacrebleu.corpus_bleu(list(said), references).score / 100,
        "chrf": sacrebleu.corpus_chrf(list(said), references).score / 100,
    }


def _rouge(said: Sequence[str], right: Sequence[str]) -> list[dict[str, Any]]:
    from rouge_score import rouge_scorer

    scorer: Any = rouge_scorer.RougeScorer([kind for kind, _ in ROUGE], use_stemmer=True)
    return [scorer.score(true, found) for true, found in zip(right, said, strict=True)]


def _text(row: Mapping[str, Any], column: str, role: str, where: str) -> str:
    value = row.get(column)
    if not isinstance(value, str):
        raise DataError(f'{where}: "{column}" is {value!r}, expected a text.')
    if not value.strip():
        raise DataError(f'{where}: the {role} ("{column}") is empty.')
    return value


def _is_there(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
