"""What prompts have in common is run once: its keys and values serve every question and answer.

    instruction, demonstrations ──┬── question 1 ──┬── answer a
            (once)                │     (once)     └── answer b
                                  └── question 2 ──┬── answer a
                                                   └── answer b

Questions run in batches of one length, answers padded on the right, so that no token ever stands
behind padding: positions are those of the whole sequences, whatever the model makes of them.
"""

from __future__ import annotations

import copy
import inspect
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graftune.errors import SettingsError

if TYPE_CHECKING:
    from graftune.tasks.prompt_costs import PromptCosts
    from graftune.tasks.task import Ready

Ids = Sequence[int]


def common_start(sequences: Sequence[Ids]) -> int:
    """Returns how many first tokens all sequences share, at least one of each being left over.

    Example:
        >>> common_start([[1, 2, 3, 4], [1, 2, 4]]), common_start([[1, 2], [1, 2]])
        (2, 1)
    """
    most = min(len(ids) for ids in sequences) - 1
    first = sequences[0]
    return next(
        (at for at in range(most) if any(ids[at] != first[at] for ids in sequences)), max(most, 0)
    )


def begin(
    kept: SharedPrompt | None,
    ready: Ready,
    before: Ids,
    prompts: Sequence[Ids],
    costs: PromptCosts,
) -> SharedPrompt:
    """Returns what runs prompts: the one kept, if it fits, else a new one, whose start is counted.

    Args:
        kept: The one that was used last.
        ready: A causal language model.
        before: The tokens of what stands before all questions.
        prompts: The whole prompts' tokens, in which the last of `before` may be others.
        costs: Where the start is added.
    """
    ids = list(before[: common_start([[*before, -1], *prompts])])
    if kept is not None and kept.ids == ids:
        return kept
    began = time.monotonic()
    made = SharedPrompt(ready, ids)
    costs.start_seconds += time.monotonic() - began
    costs.start_tokens += made.tokens
    return made


class SharedPrompt:
    """The beginning of prompts, run once.

    Args:
        ready: A causal language model.
        ids: The tokens that all prompts begin with; may be none.

    Raises:
        SettingsError: The model keeps no keys and values to share.
    """

    def __init__(self, ready: Ready, ids: Ids) -> None:
        self.model: Any = ready.model
        self.ids = list(ids)
        self.tokens = 0
        """Tokens that were run, all in all."""
        parameters = inspect.signature(self.model.forward).parameters
        self._last = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
        self._cache = self._run(None, [self.ids], last=True)[1] if self.ids else None

    def scores(
        self,
        prompts: Sequence[Ids],
        answers: Sequence[Sequence[Ids]],
        batch_size: int,
        told: Callable[[int], None] | None = None,
    ) -> list[Tensor]:
        """Returns the log-probability of each answer after its prompt, summed over its tokens.

        Args:
            prompts: Whole prompts, each beginning with the shared tokens and longer than they are.
            answers: The answers to each.
            batch_size: Sequences computed at once.
            told: Called with the number of prompts done.
        """
        found: list[Any] = [None] * len(prompts)
        done = 0
        for indices in batches_of_one_length(prompts, batch_size):
            rest = [prompts[index][len(self.ids) :] for index in indices]
            logits, cache = self._run(self._copy(len(rest)), rest, last=True)
            first = torch.log_softmax(logits[:, -1].float(), dim=-1)  # (B, vocabulary)
            length = len(self.ids) + len(rest[0])
            pairs = [(row, ids) for row, index in enumerate(indices) for ids in answers[index]]
            heads = [first[row, ids[0]] for row, ids in pairs]
            longer = [at for at, (_, ids) in enumerate(pairs) if len(ids) > 1]
            for start in range(0, len(longer), batch_size):
                some = longer[start : start + batch_size]
                tails = self._tails(cache, length, [pairs[at] for at in some])
                for at, tail in zip(some, tails, strict=True):
                    heads[at] = heads[at] + tail
            sums = torch.stack(heads).cpu().split([len(answers[index]) for index in indices])
            for index, one in zip(indices, sums, strict=True):
                found[index] = one
            done += len(indices)
            if told is not None:
                told(done)
        return found

    def continued(
        self, prompts: Sequence[Ids], batch_size: int, **settings: Any
    ) -> Iterator[tuple[list[int], list[list[int]]]]:
        """Yields the indices of prompts and what the model says after each, as `generate` does."""
        for indices in batches_of_one_length(prompts, batch_size):
            ids = torch.tensor([prompts[i] for i in indices], device=self.model.device)
            cached = {} if self._cache is None else {"past_key_values": self._copy(len(indices))}
            with torch.inference_mode():
                said = self.model.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), **cached, **settings
                )
            new = [_ended(row, settings.get("eos_token_id", ())) for row in said[:, ids.shape[1] :]]
            self.tokens += len(indices) * (ids.shape[1] - len(self.ids)) + sum(map(len, new))
            yield indices, new

    def _tails(self, cache: Any, length: int, pairs: Sequence[tuple[int, Ids]]) -> Tensor:
        """Returns the summed log-probabilities of the tokens after the first of each answer."""
        chosen = copy.deepcopy(cache)
        device = self.model.device
        chosen.batch_select_indices(torch.tensor([row for row, _ in pairs], device=device))
        logits, _ = self._run(chosen, [ids[:-1] for _, ids in pairs], past=length)
        chances = torch.log_softmax(logits.float(), dim=-1)
        sums = [
            chances[at, range(len(ids) - 1), list(ids[1:])].sum()
            for at, (_, ids) in enumerate(pairs)
        ]
        return torch.stack(sums)

    def _copy(self, rows: int) -> Any:
        """Returns the shared keys and values for so many rows; None where nothing is shared."""
        if self._cache is None:
            return None
        copied = copy.deepcopy(self._cache)
        copied.batch_select_indices(torch.zeros(rows, dtype=torch.long, device=self.model.device))
        return copied

    def _run(
        self, cache: Any, rows: Sequence[Ids], *, last: bool = False, past: int | None = None
    ) -> tuple[Tensor, Any]:
        """Returns the logits of rows, padded on the right, and the keys and values after them."""
        before = (0 if cache is None else len(self.ids)) if past is None else past
        longest = max(map(len, rows))
        device = self.model.device
        ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)
        lengths = torch.tensor([before + len(row) for row in rows], device=device)
        places = torch.arange(before + longest, device=device)
        mask = (places[None] < lengths[:, None]).long()
        keep = self._last if last else {}
        with torch.inference_mode():
            out = self.model(
                input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **keep
            )
        self.tokens += sum(map(len, rows))
        kept = getattr(out, "past_key_values", None)
        if kept is None or not hasattr(kept, "batch_select_indices"):
            raise SettingsError(
                f"{type(self.model).__name__} keeps no keys and values that prompts could share: "
                "set method.share: false."
            )
        return out.logits, kept


def batches_of_one_length(prompts: Sequence[Ids], batch_size: int) -> Iterator[list[int]]:
    """Yields the indices of prompts, of one length in each batch, the longest first."""
    by_length: dict[int, list[int]] = defaultdict(list)
    for index, ids in enumerate(prompts):
        by_length[len(ids)].append(index)
    for length in sorted(by_length, reverse=True):
        indices = by_length[length]
        for start in range(0, len(indices), batch_size):
            yield indices[start : start + batch_size]


def _ended(said: Tensor, ends: Ids) -> list[int]:
    """Returns an answer's tokens up to its end token."""
    ids: list[int] = said.tolist()
    return next((ids[: at + 1] for at, token in enumerate(ids) if token in ends), ids)
