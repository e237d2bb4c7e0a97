"""Answers by demonstrations alone: earlier turns of the chat show how to answer.

system: instruction │ user: question 1 │ assistant: its answer │ … │ user: the question │ assistant:
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from graftune.errors import DataError
from graftune.tasks.chat import IGNORED, Messages, Turns, end_tokens, prompt_tokens, tokens_of
from graftune.tasks.data import Example
from graftune.tasks.demonstrations import nearest_to, text_of
from graftune.tasks.in_context import Demonstrations, InContext
from graftune.tasks.prompt_costs import PromptCosts
from graftune.tasks.shared_prompt import SharedPrompt, begin, common_start

if TYPE_CHECKING:
    from graftune.tasks.task import Ready


class ChatPrompt:
    """A chat model that is shown how to answer.

    Args:
        settings: The user's.
        ready: The model, in eval mode.
        shown: What may be shown before a question.
        room: Tokens that the model takes in all.
    """

    def __init__(self, settings: InContext, ready: Ready, shown: Demonstrations, room: int) -> None:
        self.settings, self.ready, self.shown, self.room = settings, ready, shown, room
        self.costs = PromptCosts()
        self.ends = end_tokens(ready.tokenizer, ready.model)
        self._shared: SharedPrompt | None = None

    def answers(
        self,
        examples: Sequence[Example],
        *,
        batch_size: int,
        max_new_tokens: int = 128,
        told: Callable[[int], None] | None = None,
    ) -> list[dict[str, Any]]:
        """Returns each conversation with the model's answer (greedy).

        Raises:
            DataError: A question has no room beside the demonstrations and an answer.
        """
        began = time.monotonic()
        if not examples:
            return []
        tokenizer, costs = self.ready.tokenizer, self.costs
        prompts = self._prompts(examples, max_new_tokens)
        before = self.before([] if self.shown.vectors is not None else self.shown.rows)
        sharing = self.settings.share and bool(before)
        ids = prompt_tokens(tokenizer, before) if sharing else []
        earlier = costs.start_seconds
        self._shared = begin(self._shared, self.ready, ids, prompts, costs)
        run = self._shared.tokens
        found: list[dict[str, Any]] = [{} for _ in examples]
        done = 0
        for indices, said in self._shared.continued(
            prompts, batch_size, max_new_tokens=max_new_tokens, do_sample=False,
            eos_token_id=sorted(self.ends), pad_token_id=tokenizer.pad_token_id,
        ):  # fmt: skip
            texts = tokenizer.batch_decode(said, skip_special_tokens=True)
            for index, text, new in zip(indices, texts, said, strict=True):
                found[index] = {**examples[index].fields, "answer": text.strip()}
                costs.tokens_alone += len(prompts[index]) + len(new)
            done += len(indices)
            if told is not None:
                told(done)
        costs.tokens += self._shared.tokens - run
        costs.rows += len(examples)
        costs.seconds += time.monotonic() - began - (costs.start_seconds - earlier)
        return found

    def features(self, examples: Sequence[Example]) -> list[dict[str, Any]]:
        """Returns whole conversations as tokens, labelled where the examples' own answers are."""
        found: list[dict[str, Any]] = []
        for example, rows in zip(examples, self._shown(examples), strict=True):
            before = self.before(rows, example.fields["messages"])
            whole = self.turns(before + _spoken(example.fields["messages"]))
            known = self.turns(before).ids if before else []
            start = common_start([[*known, -1], whole.ids])
            labels = [IGNORED] * start + whole.labels[start:]
            found.append({"input_ids": whole.ids, "labels": labels})
        return found

    def before(self, rows: Sequence[dict[str, Any]], asked: Messages | None = None) -> Messages:
        """Returns the turns before a question: its system turn (or the instruction), the rows'."""
        system = [turn for turn in asked or () if turn["role"] == "system"]
        if not system and self.settings.instruction:
            system = [{"role": "system", "content": self.settings.instruction}]
        return system + [turn for row in rows for turn in _spoken(row["messages"])]

    def turns(self, messages: Messages) -> Turns:
        """Returns turns as tokens."""
        return tokens_of(self.ready.tokenizer, messages, self.ends)

    def _shown(self, examples: Sequence[Example]) -> list[list[dict[str, Any]]]:
        if self.shown.vectors is None or not self.settings.shots:
            return [self.shown.rows] * len(examples)
        texts = [text_of(example.fields) for example in examples]
        return nearest_to(texts, self.settings.shots, self.shown, self.ready)

    def _prompts(self, examples: Sequence[Example], max_new_tokens: int) -> list[list[int]]:
        found: list[list[int]] = []
        for example, rows in zip(examples, self._shown(examples), strict=True):
            asked = example.fields["messages"]
            ids = prompt_tokens(self.ready.tokenizer, self.before(rows, asked) + _spoken(asked))
            if len(ids) + max_new_tokens > self.room:
                raise DataError(
                    f"{example.where}: {len(ids)} tokens and {max_new_tokens} for the answer "
                    f"(max_new_tokens), but the model takes {self.room} in all; show fewer "
                    "demonstrations (method.shots)."
                )
            found.append(ids)
        return found


def _spoken(messages: Messages) -> Messages:
    """Returns a conversation without its system turn."""
    return [turn for turn in messages if turn["role"] != "system"]
