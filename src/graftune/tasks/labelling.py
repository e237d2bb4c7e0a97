"""Token labelling: one tag for each word, as for named entities.

columns   words and tags, lists of one length (BIO); a CoNLL file has both
head      the model class's own for tokens, newly initialised, trained with the adapter
batches   padded to the longest in each; the loss is that of each word's first token
metrics   precision, recall and F1 of whole entities, accuracy of the words' tags
answer    {"words", "tags", "entities": [{"type", "start", "end", "text", "score"}]}

Words that a cut leaves out, and those of which the tokenizer makes no token, are answered with O.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar

from graftune.errors import DataError, nearest
from graftune.tasks.bio import (
    OUTSIDE,
    consistent,
    entities,
    entity_scores,
    row_f1,
    tag_names,
    type_of,
)
from graftune.tasks.chat import IGNORED
from graftune.tasks.columns import find_column
from graftune.tasks.data import Example, normalised
from graftune.tasks.settings import Columns
from graftune.tasks.tables import Row, Table
from graftune.tasks.task import Encoded, Ready, Task, register_task

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from graftune.tasks.measured import Measured, Score

WORDS = ("words", "tokens", "word", "token")
TAGS = ("ner_tags", "tags", "labels", "ner", "entities", "tag", "label")


@register_task
class Labelling(Task):
    """One tag for each word of a text."""

    name: ClassVar[str] = "labelling"
    summary: ClassVar[str] = "a tag for each word, as for named entities (BIO)"
    model_task: ClassVar[str] = "token-classification"
    epochs: ClassVar[float] = 10
    batch_size: ClassVar[int] = 16
    max_length: ClassVar[int] = 512
    metric: ClassVar[str] = "entity_f1"
    metrics: ClassVar[tuple[str, ...]] = (
        *("entity_f1", "entity_precision", "entity_recall", "token_accuracy"),
    )
    roles: ClassVar[tuple[str, ...]] = ("words", "tags")

    def columns(self, table: Table, named: Columns) -> dict[str, str]:
        """Returns the columns of words and tags."""
        return {
            "words": str(find_column(table, "words", named.words, WORDS)),
            "tags": str(find_column(table, "tags", named.tags, TAGS)),
        }

    def examples(self, table: Table, columns: Mapping[str, str]) -> list[Example]:
        """Returns each row's words and tags, every entity beginning with B-.

        Raises:
            DataError: A row has no words, a word is empty, there are more or fewer tags than words,
                or a tag isn't one of BIO.
        """
        return [_tagged(row, columns, table.where(index)) for index, row in enumerate(table.rows)]

    def question(self, row: str | Mapping[str, Any], where: str) -> Example:
        """Returns a text, parted at its spaces, or a row with words under a usual name."""
        if isinstance(row, str):
            return _example({"words": row.split()}, {"words": "words"}, where)
        words = find_column(Table([dict(row)], where), "words", None, WORDS)
        return _example(row, {"words": str(words)}, where)

    def labels(self, splits: Mapping[str, Sequence[Example]]) -> list[str]:
        """Returns O, then B- and I- of each type in the training data, by alphabet.

        Raises:
            DataError: There is no entity; or another split has a type that training never sees.
        """
        types = sorted({name for one in splits["train"] for name in _types(one)})
        if not types:
            raise DataError(
                f"All words of the {len(splits['train'])} training rows have the tag O: there must "
                "be an entity."
            )
        for split in ("validation", "test"):
            _check_types(
                splits.get(split, ()), types, f"never occurs in the training data ({split})"
            )
        return tag_names(types)

    def check_known(self, examples: Sequence[Example], labels: Sequence[str]) -> None:
        """See `Task.check_known`."""
        types = list(dict.fromkeys(type_of(label) for label in labels[1:]))
        _check_types(examples, types, "is not one that the run was trained on")

    def prepare(self, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """Changes nothing.

        Raises:
            DataError: The tokenizer can't tell which word a token belongs to.
        """
        check_fast(tokenizer, "labelling")
        return []

    def remarks(self, examples: Sequence[Example]) -> list[str]:
        """Returns how many entities had no beginning, if any."""
        begun = sum(example.fields["begun"] for example in examples)
        if not begun:
            return []
        first = next(example.where for example in examples if example.fields["begun"])
        total = sum(len(entities(example.fields["tags"])) for example in examples)
        return [
            f"{begun} of {total} entities begin with I- and not with B- (the first in {first}): "
            "they were read as beginning there, as in IOB1."
        ]

    def encode(self, examples: Sequence[Example], ready: Ready) -> Encoded:
        """Returns each text as tokens, cut to the limit, each word's first one labelled.

        Raises:
            DataError: No word of a row is left.
        """
        number = {label: index for index, label in enumerate(ready.labels)}
        pieces = _pieces([example.fields["words"] for example in examples], ready)
        for one, example in zip(pieces, examples, strict=True):
            if not one.first:
                raise DataError(
                    f"{example.where}: the tokenizer makes no token of any of the words within the "
                    f"first {ready.max_length} tokens."
                )
            labels = [IGNORED] * len(one.features["input_ids"])
            for word, at in one.first.items():
                labels[at] = number[example.fields["tags"][word]]
            one.features["labels"] = labels
        rows = [one.features for one in pieces]
        return Encoded(rows, [one.length for one in pieces], _losses(pieces, ready.max_length))

    def summarise(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Returns the likeliest tag of each token, `(batch, tokens)`."""
        return logits.argmax(dim=-1)

    def scorer(self, examples: Sequence[Example], encoded: Encoded, ready: Ready) -> Score:
        """Returns what takes the tags of tokens for those of words, and cut words for O."""
        true = [example.fields["tags"] for example in examples]

        def score(summaries: Any, labels: Any) -> dict[str, float]:
            said: list[list[str]] = []
            for row, tags, example in zip(summaries, encoded.features, true, strict=True):
                first = [at for at, label in enumerate(tags["labels"]) if label != IGNORED]
                found = [ready.labels[int(row[at])] for at in first]
                said.append(found + [OUTSIDE] * (len(example) - len(found)))
            return self.score(said, true)

        return score

    def score(self, summaries: Any, labels: Any) -> dict[str, float]:
        """Returns the metrics of the rows' tags, lists of names, against the right ones."""
        return _metrics(summaries, labels, entity_scores(summaries, labels)[0])

    def answer(
        self, examples: Sequence[Example], ready: Ready, *, batch_size: int, max_new_tokens: int
    ) -> list[dict[str, Any]]:
        """Returns each text's words, their likeliest tags and the entities that these mark."""
        import torch

        from graftune.tasks.batches import batches_of_like_length

        pieces = _pieces([example.fields["words"] for example in examples], ready)
        rows = [one.features for one in pieces]
        answers: list[dict[str, Any]] = [{} for _ in rows]
        for indices, batch in batches_of_like_length(rows, ready, batch_size):
            with torch.inference_mode():
                logits = ready.model(**batch).logits
            best = torch.softmax(logits.float(), dim=-1).max(dim=-1)
            for index, chances, tags in zip(
                indices, best.values.tolist(), best.indices.tolist(), strict=True
            ):
                found = {
                    word: (ready.labels[tags[at]], chances[at])
                    for word, at in pieces[index].first.items()
                }
                answers[index] = _answer(examples[index].fields["words"], found)
        return answers

    def measure(
        self,
        examples: Sequence[Example],
        answers: Sequence[Mapping[str, Any]],
        labels: Sequence[str],
    ) -> Measured:
        """See `Task.measure`; each type has scores of its own."""
        from graftune.tasks.measured import Measured

        said = [one["tags"] for one in answers]
        true = [example.fields["tags"] for example in examples]
        overall, by_type = entity_scores(said, true)
        rows = [row_f1(one, other) for one, other in zip(said, true, strict=True)]
        return Measured(_metrics(said, true, overall), [], by_type, rows)

    def truth(self, example: Example) -> dict[str, Any]:
        """Returns the right tags."""
        return {"true": example.fields["tags"]}


@dataclass
class _Pieces:
    """A row's words as tokens."""

    features: dict[str, Any]
    length: int
    """Tokens before they were cut."""
    first: dict[int, int] = field(default_factory=dict[int, int])
    """The place of the first token of each word that has one."""
    cut: int = 0
    """Words that the cut left out."""
    empty: int = 0
    """Words of which the tokenizer makes no token."""


def check_fast(tokenizer: PreTrainedTokenizerBase, task: str) -> None:
    """Checks that a tokenizer knows where in the text its tokens come from.

    Raises:
        DataError: It doesn't.
    """
    if not tokenizer.is_fast:
        raise DataError(
            f"{type(tokenizer).__name__} doesn't say where in the text its tokens lie, which "
            f"{task} needs: use a base with a fast tokenizer (one that has a tokenizer.json)."
        )


def _pieces(rows: Sequence[Sequence[str]], ready: Ready) -> list[_Pieces]:
    """Returns each row's words as tokens, those of the words put together with spaces.

    So a tokenizer that makes other tokens inside a text than at its beginning (GPT-2's) sees words
    as it saw them in pretraining; the places of the tokens in the text say whose they are.
    """
    texts = [" ".join(words) for words in rows]
    whole: Any = ready.tokenizer(texts, return_offsets_mapping=True, verbose=False)
    places, kept = whole.pop("offset_mapping"), whole
    remaining = places
    if max(len(ids) for ids in whole["input_ids"]) > ready.max_length:
        kept = ready.tokenizer(
            texts, return_offsets_mapping=True, truncation=True, max_length=ready.max_length
        )
        remaining = kept.pop("offset_mapping")
    keys = [key for key in kept if key != "attention_mask"]
    found: list[_Pieces] = []
    for index, words in enumerate(rows):
        every = _first_tokens(words, places[index])
        first = _first_tokens(words, remaining[index])
        features = {key: kept[key][index] for key in keys}
        length = len(whole["input_ids"][index])
        cut, empty = len(every) - len(first), len(words) - len(every)
        found.append(_Pieces(features, length, first, cut, empty))
    return found


def _first_tokens(words: Sequence[str], places: Sequence[tuple[int, int]]) -> dict[int, int]:
    """Returns the first token of each word that has one, by the tokens' places in the text."""
    owners: list[int | None] = []
    for number, word in enumerate(words):
        owners += [number] * len(word) + [None]
    first: dict[int, int] = {}
    for at, (start, end) in enumerate(places):
        word = next((owner for owner in owners[start:end] if owner is not None), None)
        if word is not None:
            first.setdefault(word, at)
    return first


def _losses(pieces: Sequence[_Pieces], limit: int) -> list[str]:
    """Returns what is said about words that can't be answered."""
    notes: list[str] = []
    cut = [one.cut for one in pieces if one.cut]
    words = sum(len(one.first) + one.cut + one.empty for one in pieces)
    if cut:
        notes.append(
            f"{sum(cut)} of {words} words, in {len(cut)} of {len(pieces)} rows, lie behind the "
            f"first {limit} tokens (the longest row has {max(one.length for one in pieces)}): they "
            "were cut, teach nothing, and count as O."
        )
    empty = sum(one.empty for one in pieces)
    if empty:
        notes.append(
            f"Of {empty} of {words} words the tokenizer makes no token: they teach nothing, and "
            "count as O."
        )
    return notes


def _metrics(
    said: Sequence[Sequence[str]], true: Sequence[Sequence[str]], scores: Mapping[str, float]
) -> dict[str, float]:
    pairs = zip(chain(*said), chain(*true), strict=True)
    right = sum(one == other for one, other in pairs)
    words = sum(map(len, true))
    return {
        **{f"entity_{key}": scores[key] for key in ("f1", "precision", "recall")},
        "token_accuracy": right / words if words else 0.0,
    }


def _tagged(row: Row, columns: Mapping[str, str], where: str) -> Example:
    example = _example(row, columns, where)
    words, tags = example.fields["words"], row.get(columns["tags"])
    if not isinstance(tags, list | tuple):
        raise DataError(f'{where}: "{columns["tags"]}" is {tags!r:.80}, expected a list of tags.')
    if len(tags) != len(words):
        raise DataError(f"{where}: there are {len(words)} words and {len(tags)} tags.")
    for number, (word, tag) in enumerate(zip(words, tags, strict=True), start=1):
        if not isinstance(tag, str):
            hint = " (a number says nothing without its name)" if isinstance(tag, int) else ""
            raise DataError(f'{where}: the tag of word {number}, "{word}", is {tag!r}{hint}.')
        try:
            type_of(tag)
        except DataError as error:
            raise DataError(f'{where}: word {number}, "{word}": {error}.') from None
    made, begun = consistent(tags)
    return Example({"words": words, "tags": made, "begun": begun}, example.key, "", where)


def _example(row: Mapping[str, Any], columns: Mapping[str, str], where: str) -> Example:
    words = row.get(columns["words"])
    if not isinstance(words, list | tuple):
        raise DataError(
            f'{where}: "{columns["words"]}" is {words!r:.80}, expected a list of words.'
        )
    if not words:
        raise DataError(f'{where}: there are no words ("{columns["words"]}" is empty).')
    for number, word in enumerate(words, start=1):
        if not isinstance(word, str) or not word.strip():
            raise DataError(f"{where}: word {number} is {word!r}, expected a text.")
    return Example({"words": list(words)}, normalised(" ".join(words)), "", where)


def _types(example: Example) -> set[str]:
    return {type_of(tag) for tag in example.fields["tags"]} - {""}


def _check_types(examples: Sequence[Example], types: Sequence[str], what: str) -> None:
    """Raises DataError where examples have an entity of another type."""
    for example in examples:
        for number, tag in enumerate(example.fields["tags"], start=1):
            if tag != OUTSIDE and type_of(tag) not in types:
                raise DataError(
                    f'{example.where}: the tag "{tag}" (word {number}) {what}.'
                    f"{nearest(type_of(tag), types)}"
                )


def _answer(words: Sequence[str], found: Mapping[int, tuple[str, float]]) -> dict[str, Any]:
    """Returns words, the tags that were found (O for others) and their entities."""
    tags = consistent([found.get(number, (OUTSIDE, 0.0))[0] for number in range(len(words))])[0]
    marked: list[dict[str, Any]] = []
    for one in entities(tags):
        chances = [found[number][1] for number in range(one.start, one.end)]
        marked.append(
            {
                "type": one.type,
                "start": one.start,
                "end": one.end,
                "text": " ".join(words[one.start : one.end]),
                "score": sum(chances) / len(chances),
            }
        )
    return {"words": list(words), "tags": tags, "entities": marked}
