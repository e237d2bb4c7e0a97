"""Which training rows a prompt shows, and what is changed in them on purpose."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from graftune.errors import DataError, SettingsError
from graftune.tasks.data import Example
from graftune.tasks.in_context import Demonstrations, InContext

if TYPE_CHECKING:
    from torch import Tensor

    from graftune.tasks.task import Ready

_BATCH = 32
_TEXTS = ("text", "text_pair")


def chosen(
    settings: InContext, examples: Sequence[Example], labels: Sequence[str], seed: int
) -> list[dict[str, Any]]:
    """Returns the rows to show, in order; all training rows where the nearest are shown.

    Args:
        settings: How many, which, and what is changed in them.
        examples: The training rows.
        labels: Their labels; [] where rows have choices of their own, or no labels.
        seed: Draws the rows, their order (unless that has its own) and what is changed.

    Raises:
        SettingsError: There are fewer rows, or none of a kind that was asked for.
    """
    if settings.shots > len(examples):
        raise SettingsError(
            f"method.shots is {settings.shots}, but there are only {len(examples)} training rows."
        )
    if settings.select == "nearest":
        found = list(examples)
    else:
        draw = _balanced if settings.select == "balanced" else _random
        found = draw(settings.shots, examples, random.Random(f"{seed} rows"))
        order = seed if settings.order is None else settings.order
        random.Random(f"{order} order").shuffle(found)
    return _changed(settings, found, examples, labels, seed)


def with_vectors(rows: list[dict[str, Any]], ready: Ready) -> Demonstrations:
    """Returns demonstrations from which the nearest can be shown."""
    return Demonstrations(rows, vectors_of([text_of(row) for row in rows], ready))


def nearest_to(
    texts: Sequence[str], shots: int, among: Demonstrations, ready: Ready
) -> list[list[dict[str, Any]]]:
    """Returns for each text the rows whose texts are nearest to it, the nearest last.

    Near is the cosine of the mean hidden states, from which the mean of all demonstrations' is
    taken away: language models put all texts into one narrow cone.
    """
    import torch

    assert among.vectors is not None
    middle = among.vectors.mean(dim=0)
    known = torch.nn.functional.normalize(among.vectors - middle, dim=-1)
    asked = torch.nn.functional.normalize(vectors_of(texts, ready) - middle, dim=-1)
    best = (asked @ known.T).topk(shots, dim=-1).indices.flip(-1)  # (texts, shots)
    return [[among.rows[index] for index in row] for row in best.tolist()]


def text_of(row: dict[str, Any]) -> str:
    """Returns what is asked in a row's fields, as one text."""
    if "messages" in row:
        return "\n".join(turn["content"] for turn in row["messages"] if turn["role"] == "user")
    return "\n".join(row[role] for role in _TEXTS if role in row)


def vectors_of(texts: Sequence[str], ready: Ready) -> Tensor:
    """Returns each text's mean last hidden state over its own tokens, `(texts, width)`, float32."""
    import torch

    from graftune.tasks.batches import batches_of_like_length

    model: Any = ready.model
    body = model.get_encoder() if model.config.is_encoder_decoder else model.base_model
    rows = [
        {"input_ids": list(ids)}
        for ids in ready.tokenizer(
            list(texts), truncation=True, max_length=ready.max_length, verbose=False
        )["input_ids"]
    ]
    found: list[Any] = [None] * len(rows)
    for indices, batch in batches_of_like_length(rows, ready, _BATCH):
        with torch.inference_mode():
            states = body(**batch).last_hidden_state.float()
        mask = batch["attention_mask"].unsqueeze(-1)
        means = (states * mask).sum(dim=1) / mask.sum(dim=1)  # (B, H)
        for index, mean in zip(indices, means.cpu(), strict=True):
            found[index] = mean
    return torch.stack(found)


def _random(shots: int, examples: Sequence[Example], chance: random.Random) -> list[Example]:
    return chance.sample(list(examples), shots)


def _balanced(shots: int, examples: Sequence[Example], chance: random.Random) -> list[Example]:
    """Returns as many rows of each label; where that doesn't come out even, of some one more."""
    by_label: dict[str, list[Example]] = defaultdict(list)
    for example in examples:
        by_label[example.stratum].append(example)
    if "" in by_label:
        raise SettingsError("method.select is balanced, but the training rows have no labels.")
    for rows in by_label.values():
        chance.shuffle(rows)
    found: list[Example] = []
    while len(found) < shots:
        turn = [label for label, rows in by_label.items() if rows]
        chance.shuffle(turn)
        found += [by_label[label].pop() for label in turn[: shots - len(found)]]
    return found


def _changed(
    settings: InContext,
    found: Sequence[Example],
    examples: Sequence[Example],
    labels: Sequence[str],
    seed: int,
) -> list[dict[str, Any]]:
    """Returns the fields of rows, with other labels or texts where that was asked for."""
    chance = random.Random(f"{seed} changes")
    words = _words(examples) if settings.inputs == "random" else []
    rows: list[dict[str, Any]] = []
    for example in found:
        row = _fields(example)
        if words:
            row |= {
                role: " ".join(chance.choices(words, k=len(row[role].split())))
                for role in _TEXTS
                if role in row
            }
        if settings.labels == "random":
            row["answer"] = chance.choice(list(row.get("choices") or labels))
        rows.append(row)
    return rows


def _fields(example: Example) -> dict[str, Any]:
    """Returns an example's fields, the answer called alike in all tasks."""
    fields = dict(example.fields)
    if "label" in fields:
        fields["answer"] = fields.pop("label")
    return fields


def _words(examples: Sequence[Example]) -> list[str]:
    words = [word for one in examples for word in text_of(one.fields).split()]
    if not words:
        raise DataError("The training rows have no words to draw random texts from.")
    return words
