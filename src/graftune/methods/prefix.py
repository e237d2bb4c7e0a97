"""Prefix tuning: trained keys and values before those of every attention (Li & Liang 2021).

    head_i = Attn(x W_q, [P_k ; C W_k], [P_v ; C W_v])           P_k, P_v (m, d) of each layer
    P = W2 tanh(W1 E + c1) + c2 while it trains; then P alone is kept (`hidden=None`: P itself)

The prefix comes after rotation and cache: it has no position, real tokens keep theirs, and
no sliding window hides it. As an infix it is seen by the answer alone: [x ; P ; y]. E ~ N(0, 1).
Identity at init: no, attention is shared with it. Merge: no. Count: m d + hidden (d + 1) +
(hidden + 1) 2 L kv in training; 2 L m kv kept. arXiv 2101.00190.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from graftune.anatomy import Anatomy
from graftune.errors import SettingsError
from graftune.methods._attentions import Attention, attentions
from graftune.methods._gate import GATES, add_gates
from graftune.methods._prefix import Gateable, Mlp, PrefixFromMlp, PrefixValues
from graftune.methods._prefix_start import activations
from graftune.methods.base import Method, register
from graftune.sites.base import Delta, Graft
from graftune.sites.infix import infixes
from graftune.sites.placing import replace_deltas
from graftune.sites.positions import shifts

KINDS = ("attention", "cross-attention")
POSITIONS = ("front", "infix")


@register
@dataclass(frozen=True, kw_only=True)
class PrefixTuning(Method):
    """Trains keys and values that every attention sees before its own.

    Merge: not possible, they stand beside what the model computes of its input.
    """

    name: ClassVar[str] = "PrefixTuning"
    paper: ClassVar[str] = "Li & Liang 2021, Prefix-Tuning: Optimizing Continuous Prompts"
    summary: ClassVar[str] = "Trained keys and values before those of every attention."
    default_lr: ClassVar[float] = 1e-3

    length: int = 20
    """m: virtual tokens before each attention's own."""
    hidden: int | None = 512
    """Width of the MLP that makes the prefix in training; None trains the prefix itself."""
    init_tokens: tuple[int, ...] | None = None
    """Token ids, repeated or cut to the length, of which the prefix starts as the base's own keys
    and values; with hidden=None."""
    position: str = "front"
    """Where: in "front", seen by all tokens; or as an "infix" between prompt and answer, seen by
    the prompt's last token, which predicts the answer's first, and by all of the answer. Labels say
    where the answer begins (-100 before), `infix_at`, or `generate`: what it is given is prompt."""
    sublayers: tuple[str, ...] = KINDS
    """Attentions that get one: "attention", "cross-attention"."""
    dropout: float = 0.0
    """Chance that an entry of the prefix is dropped in training."""
    gate: str | None = None
    """Multiply the prefix by a gate: "token", "mean", "mean-padded" or "auto"; see `_gate`."""
    shared_gate: bool = True
    """Have one gate for keys and values; else one for each."""
    shift_keys: bool = False
    """Where attention has relative biases (T5): let real keys stand later by the prefix's length,
    as AdapterHub computes it."""
    shift_positions: bool = False
    """Let real tokens stand later by the prefix's length where a model is told positions, as HF
    PEFT, whose prefixes take the first positions."""
    layers: int | str | tuple[int, ...] | None = None
    """Blocks that get one: an index, a list, or a slice such as "6:"; None for all."""

    def check(self) -> None:
        """See `Method.check`."""
        self._check_number("length", 1)
        if self.hidden is not None:
            self._check_number("hidden", 1)
        self._check_number("dropout", 0, 1, open_high=True)
        self._check_tokens()
        self._check_choice("position", POSITIONS)
        if self.position == "infix" and (self.shift_keys or self.shift_positions):
            raise SettingsError(
                f'{self.name}: position="infix" moves no tokens: leave shift_keys and '
                "shift_positions False."
            )
        if self.gate is not None:
            self._check_choice("gate", GATES)
        unknown = [kind for kind in self.sublayers if kind not in KINDS]
        if unknown or not self.sublayers or len(set(self.sublayers)) < len(self.sublayers):
            raise SettingsError(
                f"{self.name}: sublayers is {list(self.sublayers)}, expected one or both of "
                f"{', '.join(KINDS)}."
            )

    def _check_tokens(self) -> None:
        if self.init_tokens is None:
            return
        if not self.init_tokens or min(self.init_tokens) < 0:
            raise SettingsError(
                f"{self.name}: init_tokens is {list(self.init_tokens)}, expected token ids."
            )
        if self.hidden is not None:
            raise SettingsError(
                f"{self.name}: init_tokens gives the prefix itself a start, and hidden="
                f"{self.hidden} an MLP that makes it: set hidden=None."
            )

    def plan(self, model: nn.Module, anatomy: Anatomy, *, empty: bool = False) -> list[Graft]:
        """See `Method.plan`.

        Raises:
            SettingsError: an attention that can't take a prefix.
        """
        found = list(attentions(self.name, model, anatomy, self.sublayers, self.layers))
        if self.hidden is None:
            grafts = [Graft(one.place, self._values(one, empty)) for one in found]
            if self.init_tokens is not None and not empty:
                self._start(model, found, grafts)
        else:
            grafts = self._made(found, anatomy.blocks[0].width, self.hidden, empty)
        return self._completed(model, grafts, found, anatomy, empty)

    def plan_saved(
        self, model: nn.Module, anatomy: Anatomy, tensors: Mapping[str, Tensor]
    ) -> list[Graft]:
        """See `Method.plan_saved`: once finished, a file holds the prefixes alone."""
        found = list(attentions(self.name, model, anatomy, self.sublayers, self.layers))
        if any(f"{one.place.key}.key" in tensors for one in found):
            grafts = [Graft(one.place, self._values(one, True)) for one in found]
            return self._completed(model, grafts, found, anatomy, True)
        return self.plan(model, anatomy, empty=True)

    def count(self, model: nn.Module, anatomy: Anatomy) -> int:
        """See `Method.count`: the prefixes, or what makes them."""
        found = list(attentions(self.name, model, anatomy, self.sublayers, self.layers))
        out = sum(one.key + one.value for one in found)
        gates = sum(one.width + 1 for one in found) * (0 if self.gate is None else self._gates)
        if self.hidden is None:
            return self.length * out + gates
        groups, d = len({one.group for one in found}), anatomy.blocks[0].width
        return groups * (self.length * d + self.hidden * (d + 1)) + (self.hidden + 1) * out + gates

    def changes_at_the_end(self, adapter: Any) -> bool:
        """See `Method.changes_at_the_end`: where an MLP makes the prefixes."""
        return any(isinstance(graft.delta, PrefixFromMlp) for graft in adapter.grafts)

    def finish(self, adapter: Any) -> None:
        """See `Method.finish`: keeps the prefixes and drops the MLP; the answers stay the same."""
        last: dict[Delta, Delta] = {
            graft.delta: graft.delta.values()
            for graft in adapter.grafts
            if isinstance(graft.delta, PrefixFromMlp)
        }
        for old, new in last.items():
            new.requires_grad_(next(old.parameters()).requires_grad)
        if last:
            replace_deltas(adapter.model, adapter.grafts, last)

    def _start(self, model: nn.Module, found: list[Attention], grafts: list[Graft]) -> None:
        """Lets prefixes start as the base's own keys and values of tokens."""
        assert self.init_tokens is not None
        if next(model.parameters()).is_meta:
            return
        first = 0 if self.shift_positions else -self.length
        if self.position == "infix":
            first = None
        starts = activations(self.name, model, found, self.init_tokens, self.length, first)
        for graft, (key, value) in zip(grafts, starts, strict=True):
            assert isinstance(graft.delta, PrefixValues)
            graft.delta.key.data.copy_(key)
            graft.delta.value.data.copy_(value)

    @property
    def _gates(self) -> int:
        return 1 if self.shared_gate else 2

    def _completed(
        self,
        model: nn.Module,
        grafts: list[Graft],
        found: list[Attention],
        anatomy: Anatomy,
        empty: bool,
    ) -> list[Graft]:
        """Returns the grafts with gates, and what shifts keys or positions, if asked for.

        Raises:
            SettingsError: no attention has relative biases, the model is told no positions, or an
                infix has no answer to be seen by.
        """
        if self.shift_keys:
            biased = [graft for graft in grafts if getattr(graft.place, "biases", None)]
            for graft in biased:
                assert isinstance(graft.delta, Gateable)
                graft.delta.shifts_keys = True
            if not biased:
                raise SettingsError(
                    f"{self.name}: shift_keys is for attentions with relative biases, as T5's, and "
                    "this model has none."
                )
        if self.gate is not None:
            for graft, one in zip(grafts, found, strict=True):
                assert isinstance(graft.delta, Gateable)
                graft.delta.gate_width, graft.delta.gates_in_one = one.width, self._gates
                graft.delta.reads_input = True
            add_gates(self.gate, grafts, anatomy, empty)
        if self.position == "infix":
            for graft in grafts:
                assert isinstance(graft.delta, Gateable)
                graft.delta.is_infix = True
            return grafts + infixes(self.name, model, anatomy)
        if self.shift_positions:
            return grafts + shifts(self.name, model, anatomy, self.length)
        return grafts

    def _values(self, one: Attention, empty: bool) -> PrefixValues:
        made = [torch.empty(self.length, width, **one.options) for width in (one.key, one.value)]
        if not empty:
            made = [tensor.normal_() for tensor in made]
        return PrefixValues(made[0], made[1], self.dropout)

    def _made(self, found: list[Attention], width: int, hidden: int, empty: bool) -> list[Graft]:
        common, ends = nn.Module(), dict[str, int]()
        grafts: list[Graft] = []
        for one in found:
            start = ends.get(one.group, 0)
            ends[one.group] = start + one.key + one.value
            widths = (one.key, one.value)
            delta = PrefixFromMlp(common, one.group, start, widths, self.dropout)
            grafts.append(Graft(one.place, delta))
        for group, out in ends.items():
            mlp = Mlp(self.length, width, hidden, out, found[0].options)
            if not empty:
                mlp.start()
            common.add_module(group, mlp)
        return grafts


@register
@dataclass(frozen=True, kw_only=True)
class PTuningV2(PrefixTuning):
    """Deep prompts for understanding: the prefix itself is trained, with a linear head.

    Liu et al. 2022: the same as PrefixTuning without its MLP.
    """

    name: ClassVar[str] = "PTuningV2"
    paper: ClassVar[str] = (
        "Liu et al. 2022, P-Tuning v2: Prompt Tuning Can Be Comparable to Fine-tuning Universally"
    )
    summary: ClassVar[str] = "Prefix tuning without an MLP, and a trained head."
    default_lr: ClassVar[float] = 7e-3

    hidden: int | None = None
    """Width of an MLP that makes the prefix in training; None trains the prefix itself."""
    dropout: float = 0.1
    """Chance that an entry of the prefix is dropped in training."""
