"""Multitask prompt tuning: one prompt for many tasks, scaled for each (Wang et al. 2023).

    P_k = P * (u_k v_k^T)          P (m, d) of all tasks; u_k (m, r), v_k (r, d) of task k alone
    many source tasks first; then the prompt of a target, which starts from what they learned

P starts as prompt tuning's, u_k = v_k = 1, so that P_k = P ("ones"; of a rank above 1 the further
u_k ~ N(0, 0.02^2) and v_k = 0), or u_k, v_k ~ N(0, 0.02^2) as HF PEFT has it ("normal": P_k is
nearly 0). Identity at init: no. Merge: no. Count: m d + tasks r (m + d). arXiv 2303.02861.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftune.anatomy import Anatomy
from graftune.errors import AdapterError
from graftune.methods._soft_prompts import check_stacks, embedded
from graftune.methods.base import register
from graftune.methods.prompt import PromptTuning
from graftune.sites.base import EmbeddingDelta


class MultitaskPrompt(EmbeddingDelta):
    """P, and each task's factors. Shapes: tokens (m, d), u (tasks, m, r), v (tasks, r, d)."""

    tokens: nn.Parameter
    u: nn.Parameter
    v: nn.Parameter

    def __init__(self, tokens: Tensor, is_after_first: bool, tasks: int, r: int) -> None:
        super().__init__()
        self.is_after_first, self.tasks = is_after_first, tasks
        self.length, width = tokens.shape
        self.tokens = nn.Parameter(tokens)
        self.u = nn.Parameter(tokens.new_empty(tasks, self.length, r))
        self.v = nn.Parameter(tokens.new_empty(tasks, r, width))

    def start(self, how: str) -> None:
        """Sets the factors' initial values."""
        with torch.no_grad():
            self.u.normal_(std=0.02)
            if how == "normal":
                self.v.normal_(std=0.02)
                return
            self.v.zero_()
            self.u[..., 0] = 1.0
            self.v[:, 0] = 1.0

    def prompt(self, tasks: Tensor | None = None) -> Tensor:
        """See `EmbeddingDelta.prompt`; without tasks, the first one's."""
        at = 0 if tasks is None else tasks
        return self.tokens * (self.u[at] @ self.v[at])  # ([B,] m, d)


@register
@dataclass(frozen=True, kw_only=True)
class MultitaskPromptTuning(PromptTuning):
    """Trains one prompt for many tasks, and for each two vectors that scale its rows and columns.

    Merge: not possible, the prompt stands beside the text.
    """

    name: ClassVar[str] = "MultitaskPromptTuning"
    paper: ClassVar[str] = (
        "Wang et al. 2023, Multitask Prompt Tuning Enables Parameter-Efficient Transfer Learning"
    )
    enters_blocks: ClassVar[bool] = False
    summary: ClassVar[str] = "One prompt for many tasks, scaled for each by two vectors."

    tasks: int = 1
    """How many tasks it has: the sources together, or one target."""
    r: int = 1
    """Rank of what scales the prompt for a task."""
    task_init: str = "ones"
    """Initial u and v: "ones" scales by 1; "normal" N(0, 0.02^2), as HF PEFT."""
    task_lr_ratio: float = 4 / 3
    """Learning rate of u and v as a multiple of the prompt's: 0.4 and 0.3 in the paper."""

    def check(self) -> None:
        """See `Method.check`."""
        super().check()
        self._check_number("tasks", 1)
        self._check_number("r", 1)
        self._check_choice("task_init", ("ones", "normal"))
        self._check_number("task_lr_ratio", 0)

    def count(self, model: nn.Module, anatomy: Anatomy) -> int:
        """See `Method.count`: m d + tasks r (m + d)."""
        widths = [place.width for place in self.places(model, anatomy)]
        own = [self.tasks * self.r * (self.length + width) for width in widths]
        return self.length * sum(widths) + sum(own)

    def param_groups(self, adapter: Any, lr: float) -> list[dict[str, Any]] | None:
        """See `Method.param_groups`: u and v learn faster, and don't decay."""
        deltas: list[Any] = [graft.delta for graft in embedded(adapter)]
        factors = [factor for delta in deltas for factor in (delta.u, delta.v)]
        fast = {"params": factors, "lr": lr * self.task_lr_ratio, "weight_decay": 0.0}
        return [{"params": [delta.tokens for delta in deltas], "lr": lr}, fast]

    def prompt_of(self, adapter: Any, task: int | str | None = None) -> Tensor:
        """See `SoftPrompt.prompt_of`: of a task, of their mean ("average"), or P ("shared")."""
        found = self._parts(adapter, task)
        made = [tokens if task == "shared" else tokens * (u @ v) for tokens, u, v in found]
        return torch.cat(made).detach()

    def start_from(self, adapter: Any, source: Any, task: int | str | None = None) -> None:
        """See `Method.start_from`: a target's start, from its sources or from another soft prompt.

        Of sources it takes P, and the mean of their u and v ("average", if None is named), those of
        one of them, or none ("shared").
        """
        method = source.method
        if not isinstance(method, MultitaskPromptTuning):
            super().start_from(adapter, source, task)
            return
        parts = method._parts(source, task)
        check_stacks(adapter, source)
        own: dict[str, Tensor] = {}
        for graft, (tokens, u, v) in zip(embedded(adapter), parts, strict=True):
            key = graft.place.key
            own[f"{key}.tokens"] = tokens.detach()
            if task != "shared":
                own[f"{key}.u"] = u.detach().expand(self.tasks, -1, -1)
                own[f"{key}.v"] = v.detach().expand(self.tasks, -1, -1)
        adapter.load_state_dict(own, strict=False)

    def _parts(self, adapter: Any, task: int | str | None) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Returns P, and u and v of a task or their means, of each stack.

        Raises:
            AdapterError: there is no such task.
        """
        deltas: list[Any] = [graft.delta for graft in embedded(adapter)]
        if task in (None, "average", "shared"):
            return [(delta.tokens, delta.u.mean(0), delta.v.mean(0)) for delta in deltas]
        if isinstance(task, bool) or not isinstance(task, int) or not 0 <= task < self.tasks:
            raise AdapterError(
                f'task is {task!r}; adapter "{adapter.name}" has 0 to {self.tasks - 1}, "average" '
                'and "shared".'
            )
        return [(delta.tokens, delta.u[task], delta.v[task]) for delta in deltas]

    def _delta(self, tokens: Tensor, is_after_first: bool, empty: bool) -> EmbeddingDelta:
        delta = MultitaskPrompt(tokens, is_after_first, self.tasks, self.r)
        if not empty:
            delta.start(self.task_init)
        return delta


def distillation(student: Any, teacher: Any, mask: Tensor | None = None) -> Tensor:
    """Returns how far a model's answers are from those of the prompts trained for one task each.

    KL(teacher || student) of the logits, plus the mean squared distance of hidden states where
    both outputs have them: `loss + 0.9 * distillation(student, teacher)` in the paper.

    Args:
        student: what the model answered under the multitask prompt.
        teacher: what it answered under the teachers', `gt.Rows([...])` for a mixed batch.
        mask: which answers count, of the logits' shape without the last dimension; None for all.

    Example:
        >>> from types import SimpleNamespace as Output
        >>> same = Output(logits=torch.tensor([[0.5, 2.0]]))
        >>> float(distillation(same, same))
        0.0
    """
    said, wanted = (output.logits.float().log_softmax(-1) for output in (student, teacher))
    apart = F.kl_div(said, wanted.detach(), log_target=True, reduction="none").sum(-1)
    total = apart.mean() if mask is None else apart[mask.bool()].mean()
    seen, expected = _states(student), _states(teacher)
    for state, aim in zip(seen, expected, strict=True) if seen and expected else ():
        total = total + F.mse_loss(state.float(), aim.detach().float()) / len(seen)
    return total


def _states(output: Any) -> tuple[Tensor, ...]:
    names = ("hidden_states", "encoder_hidden_states", "decoder_hidden_states")
    return tuple(state for name in names for state in getattr(output, name, None) or ())
