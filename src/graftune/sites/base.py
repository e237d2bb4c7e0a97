"""What a site is: an `nn.Module` below its host that holds the deltas of every adapter there.

    host (q_proj)                        unchanged class, names and tensors
    └── deltas: Deltas                   one per host
        ├── input: InputSite             x -> delta(x)
        ├── output: LinearSite           y -> y + delta(x, y)
        │   ├── intents: LoRADelta       one per adapter
        │   └── spam: LoRADelta
        ├── parameters: ParameterSite    theta -> value(theta) while the host runs
        │   └── intents: bias: OwnValue
        ├── sublayer: SublayerSite       h -> delta(h, x), h on its way to the residual sum
        ├── attention: AttentionSite     more keys and values, below the attention itself
        ├── embedding: EmbeddingSite     virtual tokens among those that enter the body
        ├── hidden: HiddenPromptSite     virtual tokens behind its embedding layer
        ├── trunk: TrunkSite             a side network beside all blocks of the body
        └── infix: InfixSite             from which token on infixes are seen, of the whole model

Hooks are bound methods of these modules, so a copy, a pickle or a replica takes them along.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from graftune.composition import Fused, Step, Steps, names_in
from graftune.errors import AdapterError
from graftune.sites import masks
from graftune.sites.places import AttentionPlace as AttentionPlace
from graftune.sites.places import EmbeddingPlace as EmbeddingPlace
from graftune.sites.places import HiddenPlace as HiddenPlace
from graftune.sites.places import InfixPlace as InfixPlace
from graftune.sites.places import LinearPlace as LinearPlace
from graftune.sites.places import ParameterPlace as ParameterPlace
from graftune.sites.places import Place as Place
from graftune.sites.places import PlaceBeside as PlaceBeside
from graftune.sites.places import PositionPlace as PositionPlace
from graftune.sites.places import SublayerPlace as SublayerPlace
from graftune.sites.places import TrunkPlace as TrunkPlace
from graftune.sites.plan import ALWAYS, RowsAt, joined, taken
from graftune.sites.state import Active


class Delta(nn.Module):
    """The trainable tensors and the maths of one adapter at one place.

    A child module named `common` is one for all deltas of the adapter (a projection, a vector that
    they share); its tensors belong to the adapter, not to the place.
    """

    resumes: ClassVar[tuple[str, ...]] = ()
    """Names of buffers that resumed training needs and the adapter's own file doesn't; one may be
    None, once it is needed no more."""
    rank: int | None = None
    """Largest rank of the change, where it is bounded."""
    follows: bool = False
    """Whether it only repeats another delta's change on a tied tensor."""
    needs_masks: bool = False
    """Whether it asks `graftune.sites.masks` which tokens are real."""
    shared: bool = True
    """Whether modules tied to the host's tensor see the change too (of parameter deltas)."""

    def changes(self, size: int) -> int:
        """Returns how many of the `size` entries of the base's tensor differ when it is applied."""
        return size

    def begin_forward(self) -> None:
        """Readies a training pass of the whole model, as by drawing the noise that it will use."""

    def merged(self, weight: Tensor, host: nn.Module) -> Tensor:
        """Returns what `weight` becomes when the change is written into it.

        Args:
            weight: float32, `(out, in, ...)`, the rows of the place alone; or the parameter itself.
            host: the module it belongs to.

        Raises:
            AdapterError: if the maths doesn't allow it.
        """
        raise AdapterError(f"A {type(self).__name__} can't be merged into the base's weights.")


class LinearDelta(Delta):
    """A delta that reads a host's input and output."""

    def bias_change(self, bias: Tensor | None) -> Tensor | None:
        """Returns what merging adds to the host's `bias`, `(out,)` as it is now, or None."""
        return None

    def forward(self, x: Tensor, y: Tensor, host: nn.Module) -> Tensor:
        """Returns the new output.

        Args:
            x: the host's input, `(..., in)` (ids for an embedding).
            y: its output, `(..., out)`, or the place's rows of it.
            host: the module, for deltas that need its weight.
        """
        raise NotImplementedError


class InputDelta(Delta):
    """A delta of what enters a host; every adapter's other change there sees its answer."""

    undoes: ClassVar[bool] = False
    """Whether it takes back what the adapter did before: of several, the last undoes first."""

    def forward(self, x: Tensor, host: nn.Module) -> Tensor:
        """Returns the new input, `(..., in)`."""
        raise NotImplementedError


class ParameterDelta(Delta):
    """A delta that replaces a host's tensor while the host runs."""

    def forward(self, value: Tensor | None, base: Tensor | None) -> Tensor:
        """Returns the tensor to use.

        Args:
            value: what the adapters before this one made of it (the base tensor at first).
            base: the host's own tensor, None where it has none.
        """
        raise NotImplementedError

    def merged(self, weight: Tensor, host: nn.Module) -> Tensor:
        """See `Delta.merged`."""
        return self(weight, weight)


class Seen(NamedTuple):
    """What a sublayer's delta may read beside h; None is what it didn't ask for."""

    input: Tensor | None = None
    """What the sublayer saw, `(..., width)`: after the norm, in pre-norm blocks."""
    residual: Tensor | None = None
    """What h is added to."""
    norm: nn.Module | None = None
    """The norm of their sum, in post-norm blocks."""

    def rows(self, at: RowsAt) -> Seen:
        """Returns some rows of it."""
        read, added = (t if t is None else taken(t, at) for t in (self.input, self.residual))
        return Seen(read, added, self.norm)


class Bottleneck(NamedTuple):
    """What a fusion needs of a bottleneck adapter: what it read, made of it, and adds that to."""

    read: Tensor
    change: Tensor
    skip: Tensor


class SublayerDelta(Delta):
    """A delta of what a sublayer answers, on its way to the residual sum."""

    @property
    def reads(self) -> frozenset[str]:
        """Which of `Seen`'s fields it reads."""
        return frozenset()

    def forward(self, h: Tensor, seen: Seen) -> Tensor:
        """Returns the new answer, `(..., width)`; it acts on the last dimension alone."""
        raise NotImplementedError

    def bottleneck(self, h: Tensor, seen: Seen) -> Bottleneck:
        """Returns what a fusion attends to.

        Raises:
            AdapterError: it has no bottleneck.
        """
        raise AdapterError(f"A {type(self).__name__} can't be fused: it has no bottleneck.")


class AttentionDelta(Delta):
    """A delta of an attention: keys and values more, or something added to its output."""

    reads_input: bool = False
    """Whether `gates` multiply its keys and values."""
    shifts_keys: bool = False
    """Whether the attention's own keys then stand later by the prefix's length (T5's biases)."""
    is_infix: bool = False
    """Whether only the answer's tokens see its keys and values; see `graftune.sites.infix`."""

    def gates(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Returns what multiplies keys and values, `(B, q, 1)` each, or `(B, 1, 1)` of rows.

        Args:
            hidden: what the attention is given, `(B, q, width)`.
        """
        raise NotImplementedError

    def prefix(self, heads: int) -> tuple[Tensor, Tensor] | None:
        """Returns keys and values, each `(length, kv heads * head size)`, or None for none.

        Args:
            heads: of keys and values.
        """
        return None

    def added(self, query: Tensor, module: nn.Module, scaling: float | None) -> Tensor | None:
        """Returns what is added to the attention's output before the output projection, or None.

        Args:
            query: `(B, H, q, D)`, rotated.
            module: the attention.
            scaling: what the model multiplies scores by.

        Returns:
            `(B, q, H, D)`.
        """
        return None


class EmbeddingDelta(Delta):
    """Virtual tokens, put among the embedded tokens of every row.

    Attributes:
        length: how many there are.
        is_after_first: whether they follow the first real token; else they come before it.
        marker: the token in whose places they are instead, in order; the text holds it as often.
        tasks: how many tasks it has virtual tokens for, each its own; 0 where all rows are alike.
    """

    length: int
    is_after_first: bool = False
    stays: bool = False
    """Whether it stays in what the body answers (behind the embedding layer alone)."""
    marker: int | None = None
    tasks: int = 0

    def prompt(self, tasks: Tensor | None = None) -> Tensor:
        """Returns the embeddings of the virtual tokens.

        Args:
            tasks: each row's task, `(B,)`; given where the delta has several.

        Returns:
            `(length, width)`, or `(B, length, width)` where rows differ.
        """
        raise NotImplementedError


class TrunkDelta(Delta):
    """A side network: narrow blocks fed with the hidden states of a body's blocks.

    Attributes:
        config: what a cache for its blocks is made from.
        width: of its hidden states.
        trunk_width: of the trunk's.
        trunk_dropout: whether the trunk drops out in training; one active side that doesn't want
            it is enough that it doesn't.
    """

    config: Any
    width: int
    trunk_width: int
    trunk_dropout: bool = False

    def blank(self, entering: Tensor) -> Tensor:
        """Returns embeddings for its body, `(B, T, width)`; of what enters the trunk's blocks."""
        raise NotImplementedError

    def side_states(self, hidden: list[Tensor], given: dict[str, Any]) -> Tensor:
        """Returns its last hidden state, `(B, T, width)`.

        Args:
            hidden: what enters the trunk's first block and what leaves each, `(B, T, d)`.
            given: what its body is called with.
        """
        raise NotImplementedError

    def ended(self, last: Tensor, side: Tensor) -> Tensor:
        """Returns what the body answers, `(B, T, d)`.

        Args:
            last: the trunk's last hidden state, `(B, T, d)`, or what another side made of it.
            side: this side's, `(B, T, width)`.
        """
        raise NotImplementedError


@dataclass(eq=False)
class Graft:
    """One delta and where it goes."""

    place: Place
    delta: Delta
    part: int = 0
    """Number of the method that it is of, in an adapter made of several."""

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yields (absolute name, tensor) of parameters and kept buffers.

        An adapter's own value goes by the tensor's own name, what all deltas have in common by its
        name there; every delta yields that.
        """
        for name, tensor in self.delta.state_dict(keep_vars=True).items():
            yield self._named(name), tensor

    def training_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yields (absolute name, buffer) of what only resumed training needs."""
        for name in self.delta.resumes:
            buffer = self.delta._buffers[name]
            if buffer is not None:
                yield self._named(name), buffer

    def _named(self, name: str) -> str:
        if name.startswith("common."):
            return name.removeprefix("common.")
        is_own = name == "value" and isinstance(self.place, ParameterPlace)
        return self.place.key if is_own else f"{self.place.key}.{name}"


class Deltas(nn.Module):
    """All sites of one host; `deltas["task"]` is the delta (or sites' deltas) of an adapter."""

    def __getitem__(self, name: str) -> Any:
        found = {s: m._modules[name] for s, m in self._modules.items() if name in m._modules}  # type: ignore[union-attr]
        if not found:
            raise KeyError(name)
        return next(iter(found.values())) if len(found) == 1 else found


def is_base(name: str) -> bool:
    """Whether a tensor's absolute name is the base's own, not that of a delta."""
    return ".deltas." not in f".{name}"


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Returns the modules of the base by path, each once; those of adapters aren't walked into."""
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()
    pending = [("", model)]
    while pending:
        path, module = pending.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        found[path] = module
        prefix = f"{path}." if path else ""
        children = list(module._modules.items())
        pending += [
            (prefix + name, child)
            for name, child in reversed(children)
            if child is not None and not isinstance(child, Deltas)
        ]
    return found


class Site(nn.Module):
    """A place's deltas by adapter, and the hooks that let them act."""

    def __init__(self, active: Active, layer: int = ALWAYS) -> None:
        super().__init__()
        self.active = active
        self.layer = layer
        """Position of its block in the stack; ALWAYS outside blocks."""
        self.handles: list[Any] = []

    def hook(self, host: nn.Module) -> None:
        """Registers this site's hooks on the host."""
        raise NotImplementedError

    def unhook(self, host: nn.Module) -> None:
        """Takes the hooks away, and what they may have left on the host."""
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def take(self, model: nn.Module, name: str, graft: Graft) -> None:
        """Adds an adapter's delta.

        Args:
            model: the base.
            name: the adapter's.
            graft: whose place is this site's.
        """
        self._modules[name] = graft.delta

    def holds(self, steps: Steps) -> bool:
        """Whether an adapter that takes part in some steps has something here."""
        return any(name in self._modules for name in names_in(steps))

    def mixed_rows(self, batch: int, device: torch.device) -> Iterator[tuple[Steps, RowsAt]]:
        """Yields (steps, rows) of the plan in force for a batch."""
        plan = self.active.current()
        for group, (steps, _) in enumerate(plan.groups or ()):
            yield steps, plan.rows(group, batch, device)

    def mixed(self, value: Tensor, change: Callable[[Steps, RowsAt, Tensor], Tensor]) -> Tensor:
        """Returns a value of which each group's rows are as its own steps change them.

        Args:
            value: `(batch, ...)`.
            change: takes steps, the rows they act on, and these rows of the value.
        """
        parts: list[tuple[RowsAt, Tensor]] = []
        is_changed = False
        for steps, at in self.mixed_rows(value.shape[0], value.device):
            part = taken(value, at)
            if self.acts(steps):
                with masks.of_rows(at, value.shape[0]):
                    part, is_changed = change(steps, at, part), True
            parts.append((at, part))
        return joined(parts) if is_changed else value

    def acts(self, steps: Steps) -> bool:
        """Whether this site's hook changes something in some steps."""
        return self.holds(steps)


def branched(
    step: Step,
    value: Tensor,
    run: Callable[[Steps, Tensor], Tensor],
    holds: Callable[[Steps], bool],
) -> Tensor:
    """Returns what an Average makes of a value; of a Fuse, the fusion's own part.

    Args:
        step: the composition.
        value: what its members start from.
        run: applies steps to a value.
        holds: whether steps change anything here.
    """
    if isinstance(step, Fused):
        return run((step.name,), value)
    assert not isinstance(step, str)
    changed = [(weight, run(steps, value)) for weight, steps in step.branches if holds(steps)]
    if not changed:
        return value
    rest = 1.0 - sum(weight for weight, _ in changed)
    total = sum(weight * made for weight, made in changed)
    assert isinstance(total, Tensor)
    return total if abs(rest) < 1e-9 else total + rest * value
