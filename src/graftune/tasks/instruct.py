"""Following instructions: a chat model learns the assistant's answers.

columns   instruction (input) and answer, or messages with several turns
head      none: the language model's own
batches   padded to the longest in each; loss on the answers and their end token only
metrics   perplexity and exact token accuracy on the answers
answer    {"messages", "answer"}
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from graftune.errors import DataError
from graftune.tasks.chat import (
    IGNORED,
    PLAIN_TEMPLATE,
    end_tokens,
    prompt_tokens,
    shorten,
    shorten_prompt,
    tokens_of,
)
from graftune.tasks.columns import find_column
from graftune.tasks.conversations import ANSWERS, INPUTS, INSTRUCTIONS, MESSAGES, conversation
from graftune.tasks.data import Example, normalised
from graftune.tasks.settings import Columns
from graftune.tasks.tables import Table
from graftune.tasks.task import Encoded, Ready, Task, register_task
from graftune.tasks.token_scores import token_metrics, token_sums

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

MODEL_LIMIT_KEY = "max_position_embeddings"


@register_task
class Instruct(Task):
    """Answers to instructions, in the model's own chat template."""

    name: ClassVar[str] = "instruct"
    summary: ClassVar[str] = "answers to instructions, in the model's chat template"
    model_task: ClassVar[str] = "causal-lm"
    epochs: ClassVar[float] = 3
    batch_size: ClassVar[int] = 8
    max_length: ClassVar[int] = 1024
    metric: ClassVar[str] = "loss"
    metrics: ClassVar[tuple[str, ...]] = ("perplexity", "token_accuracy")
    roles: ClassVar[tuple[str, ...]] = ("instruction", "input", "answer", "messages")
    packs: ClassVar[bool] = True

    def columns(self, table: Table, named: Columns) -> dict[str, str]:
        """Returns the column of messages, or those of instruction, input (if any) and answer."""
        single = named.instruction or named.answer or named.input
        if named.messages or not single:
            column = find_column(table, "messages", named.messages, MESSAGES, required=False)
            if column is not None:
                return {"messages": column}
        found = {
            "instruction": find_column(table, "instruction", named.instruction, INSTRUCTIONS),
            "input": find_column(table, "input", named.input, INPUTS, required=False),
            "answer": find_column(table, "answer", named.answer, ANSWERS),
        }
        return {role: column for role, column in found.items() if column is not None}

    def examples(self, table: Table, columns: Mapping[str, str]) -> list[Example]:
        """Returns each row as a conversation.

        Raises:
            DataError: A text is empty or no text; a role is unknown; nobody answers.
        """
        found: list[Example] = []
        for index, row in enumerate(table.rows):
            where = table.where(index)
            messages = conversation(row, columns, where)
            if all(message["role"] != "assistant" for message in messages):
                raise DataError(f"{where}: no message is the assistant's, so nothing is learnt.")
            found.append(Example({"messages": messages}, _key(messages), "", where))
        return found

    def question(self, row: str | Mapping[str, Any], where: str) -> Example:
        """Returns a text, or a row with messages or an instruction, without the last answer."""
        row = {"instruction": row} if isinstance(row, str) else row
        table = Table([dict(row)], where)
        column = find_column(table, "messages", None, MESSAGES, required=False)
        columns = {"messages": column} if column else _asked(table)
        messages = conversation(row, columns, where)
        while messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        if not messages:
            raise DataError(f"{where}: no message is the user's, so there is nothing to answer.")
        return Example({"messages": messages}, _key(messages), "", where)

    def labels(self, splits: Mapping[str, Sequence[Example]]) -> list[str]:
        """Returns no labels: an answer is any text."""
        return []

    def prepare(self, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """Gives a tokenizer without a chat template a plain one.

        Raises:
            DataError: It has no end token, so that a trained model would never stop.
        """
        if tokenizer.eos_token_id is None:
            raise DataError(
                "The base's tokenizer has no end token, so a model trained on its answers would "
                "never stop: set tokenizer.eos_token, save the tokenizer and use that folder."
            )
        if tokenizer.chat_template:
            return []
        tokenizer.chat_template = PLAIN_TEMPLATE
        return ["The base has no chat template, so a plain one is used (### User, ### Assistant)."]

    def encode(self, examples: Sequence[Example], ready: Ready) -> Encoded:
        """Returns each conversation as tokens, cut to the limit, labelled on its answers."""
        ends = end_tokens(ready.tokenizer, ready.model)
        encoded, losses, unclosed = Encoded(), Counter[str](), 0
        for example in examples:
            turns = tokens_of(ready.tokenizer, example.fields["messages"], ends)
            if all(label == IGNORED for label in turns.labels):
                raise DataError(f"{example.where}: no token of the answer could be labelled.")
            encoded.lengths.append(len(turns.ids))
            turns, lost = shorten(turns, ready.max_length)
            losses[lost] += 1
            unclosed += not turns.closed
            encoded.features.append({"input_ids": turns.ids, "labels": turns.labels})
        encoded.notes = _losses(losses, len(examples), max(encoded.lengths), ready.max_length)
        if unclosed:
            encoded.notes.append(
                f"The chat template doesn't close an answer with an end token in {unclosed} of "
                f"{len(examples)} rows; {ready.tokenizer.eos_token!r} was put after the last one."
            )
        return encoded

    def summarise(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Returns each row's summed loss, labelled tokens and right tokens `(batch, 3)`."""
        return token_sums(logits[:, :-1], labels[:, 1:])

    def score(self, summaries: Any, labels: Any) -> dict[str, float]:
        """Returns perplexity and token accuracy over all answers' tokens."""
        return token_metrics(summaries)

    def row_scores(self, summaries: Any) -> list[float]:
        """Returns the share of each row's answer tokens that are right."""
        return [float(right) / max(float(tokens), 1.0) for _, tokens, right in summaries]

    def answer(
        self, examples: Sequence[Example], ready: Ready, *, batch_size: int, max_new_tokens: int
    ) -> list[dict[str, Any]]:
        """Returns each conversation with the model's answer (greedy)."""
        import torch

        from graftune.tasks.batches import batches_of_like_length

        rows = _prompts(examples, ready, max_new_tokens)
        answers: list[dict[str, Any]] = [{} for _ in rows]
        stops = sorted(end_tokens(ready.tokenizer, ready.model))
        model: Any = ready.model
        for indices, batch in batches_of_like_length(rows, ready, batch_size, side="left"):
            with torch.inference_mode():
                said = model.generate(
                    **batch, max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=stops,
                    pad_token_id=ready.tokenizer.pad_token_id,
                )  # fmt: skip
            texts = ready.tokenizer.batch_decode(
                said[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
            )
            for index, text in zip(indices, texts, strict=True):
                answers[index] = {**examples[index].fields, "answer": text.strip()}
        return answers


def _asked(table: Table) -> dict[str, str]:
    instruction = find_column(table, "instruction", None, INSTRUCTIONS)
    about = find_column(table, "input", None, INPUTS, required=False)
    return {"instruction": str(instruction)} | ({"input": about} if about else {})


def _prompts(
    examples: Sequence[Example], ready: Ready, max_new_tokens: int
) -> list[dict[str, list[int]]]:
    room: int = getattr(ready.model.config, MODEL_LIMIT_KEY, None) or ready.max_length
    limit = room - max_new_tokens
    if limit < 1:
        raise DataError(
            f"max_new_tokens is {max_new_tokens}, but the model holds {room} tokens in all; leave "
            "some for the question."
        )
    prompts = [prompt_tokens(ready.tokenizer, one.fields["messages"]) for one in examples]
    return [{"input_ids": shorten_prompt(ids, limit)} for ids in prompts]


def _key(messages: Sequence[Mapping[str, str]]) -> str:
    return "\x1f".join(normalised(m["content"]) for m in messages if m["role"] != "assistant")


def _losses(losses: Counter[str], rows: int, longest: int, limit: int) -> list[str]:
    cut = {what: count for what, count in losses.items() if what}
    if not cut:
        return []
    parts = ", ".join(f"{count} lost {what}" for what, count in sorted(cut.items()))
    return [
        f"{sum(cut.values())} of {rows} conversations are longer than {limit} tokens (the longest "
        f"has {longest}): {parts}."
    ]
