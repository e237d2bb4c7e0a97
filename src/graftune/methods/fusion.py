"""AdapterFusion: attention over what several trained adapters would add (Pfeiffer et al. 2021).

    s_n = (Q z + c_Q) . (K u_n + c_K)        z: what the adapters read;  u_n: what each adds
    a = softmax over n of s / T              per token and layer, no heads, no 1 / sqrt(d)
    h' = r + V sum_n a_n u_n                 r: what the adapters add to

Q, K ~ N(0, 0.02^2), biases 0; V the identity, 1e-6 beside the diagonal: at first about the mean of
the adapters. Stage one trains the adapters, each alone or all together; stage two, this, the fusion
alone: base and adapters stay frozen. Penalty: lambda sum ||V - I||^2. Merge: no.
Count: 3 d^2 + 2 d a place, 2 d^2 + 2 d without V. arXiv 2005.00247, section 3.2.

Since K is linear, s_n = u_n . K^T (Q z + c_Q) + c_K . (Q z + c_Q), and since V is, it acts on the
sum: three products with d x d matrices a token, however many adapters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftune.anatomy import Anatomy
from graftune.anatomy.modules import is_in
from graftune.composition import Stack
from graftune.errors import AdapterError, SettingsError, nearest
from graftune.methods.base import HeatMap, Method, register
from graftune.sites import hosts
from graftune.sites.base import Bottleneck, Deltas, Graft, Seen, SublayerDelta, SublayerPlace
from graftune.sites.sublayer import SublayerSite

OFF_DIAGONAL = 1e-6
"""What V starts as beside its diagonal."""


class FusionDelta(SublayerDelta):
    """Attention over the bottlenecks at one sublayer.

    Shapes: query and key (d, d), query_bias and key_bias (d), value (d, d) or absent; kept
    (members) bool, those not pruned; attention (members), their mean weights when last measured,
    before that zeros.
    """

    query: nn.Parameter
    query_bias: nn.Parameter
    key: nn.Parameter
    key_bias: nn.Parameter
    value: nn.Parameter | None
    kept: Tensor
    attention: Tensor

    def __init__(self, settings: AdapterFusion, width: int, options: Any) -> None:
        super().__init__()
        for name in ("query", "key"):
            self.register_parameter(name, nn.Parameter(torch.empty(width, width, **options)))
            self.register_parameter(f"{name}_bias", nn.Parameter(torch.empty(width, **options)))
        value = nn.Parameter(torch.empty(width, width, **options)) if settings.value else None
        self.register_parameter("value", value)
        members = len(settings.members)
        device = options["device"]
        self.register_buffer("kept", torch.ones(members, dtype=torch.bool, device=device))
        self.register_buffer("attention", torch.zeros(members, device=device))
        self.p, self.temperature = settings.dropout, settings.temperature
        self.reads_answer = settings.query_from == "answer"
        self.adds_before = settings.adds_before
        self.seen: list[Tensor] | None = None
        """Where attention is noted while it is being measured."""

    def start(self) -> None:
        """Sets the initial values."""
        for tensor in (self.query, self.key):
            nn.init.normal_(tensor, std=0.02)
        for tensor in (self.query_bias, self.key_bias):
            nn.init.zeros_(tensor)
        if self.value is not None:
            nn.init.constant_(self.value, OFF_DIAGONAL)
            with torch.no_grad():
                self.value.fill_diagonal_(1.0)

    @property
    def is_measured(self) -> bool:
        """Whether its attention was measured on data."""
        return bool(self.attention.any())

    def kept_members(self) -> list[int]:
        """Returns which members take part, by their place in the list."""
        return self.kept.nonzero().flatten().tolist()

    def forward(self, h: Tensor, seen: Any) -> Tensor:
        """Returns h', `(..., d)`.

        Args:
            h: the sublayer's answer.
            seen: what each member that takes part reads, adds, and adds it to, in order.
        """
        parts: Sequence[Bottleneck] = seen
        changes = torch.stack([part.change for part in parts], dim=-2)  # (..., n, d)
        read = h if self.reads_answer else parts[-1].read
        weights = self.weights(read.to(changes.dtype), changes)
        if self.seen is not None:
            self.seen.append(weights.detach())
        mean = (weights.unsqueeze(-2) @ changes).squeeze(-2)  # (..., d)
        skip = parts[-1].skip.to(mean.dtype)
        total = mean + skip if self.adds_before else mean
        total = total if self.value is None else F.linear(total, self.value)
        return (total if self.adds_before else total + skip).to(h.dtype)

    def weights(self, z: Tensor, changes: Tensor) -> Tensor:
        """Returns a, `(..., n)`, which sums to one."""
        asked = F.linear(z, self.query, self.query_bias)
        scores = (changes @ F.linear(asked, self.key.t()).unsqueeze(-1)).squeeze(-1)
        scores = scores + (asked @ self.key_bias).unsqueeze(-1)
        if self.p and self.training:
            scores = F.dropout(scores, self.p)
        return torch.softmax(scores / self.temperature, dim=-1)

    def bottleneck(self, h: Tensor, seen: Seen) -> Bottleneck:
        """See `SublayerDelta.bottleneck`."""
        raise AdapterError("A fusion can't be a member of another: fuse the adapters themselves.")


@register
@dataclass(frozen=True, kw_only=True)
class AdapterFusion(Method):
    """Trains attention over attached adapters with bottlenecks, which stay as they are.

    Merge: not possible, attention isn't linear.
    """

    name: ClassVar[str] = "AdapterFusion"
    paper: ClassVar[str] = (
        "Pfeiffer et al. 2021, AdapterFusion: Non-Destructive Task Composition for Transfer "
        "Learning"
    )
    summary: ClassVar[str] = "Attention over several trained adapters, which stay frozen."
    default_lr: ClassVar[float] = 5e-5

    members: tuple[str | tuple[str, ...], ...] = ()
    """The adapters to fuse, attached before; a list in the list is a Stack of them."""
    value: bool = True
    """Train V; without, the fusion is the weighted mean itself ("static")."""
    value_penalty: float = 0.01
    """Lambda: what ||V - I||^2, summed over the places, adds to the loss."""
    query_from: str = "read"
    """What the query is made of: what the adapters "read", or the sublayer's "answer"."""
    adds_before: bool = False
    """Let V act on the sum of r and the adapters' part, not on their part alone."""
    temperature: float = 1.0
    """T: above 1 the weights are more even."""
    dropout: float = 0.0
    """Chance that a score is dropped (set to 0) in training."""

    def check(self) -> None:
        """See `Method.check`."""
        if len(self.members) < 2 or len(set(self.members)) < len(self.members):
            raise SettingsError(
                f"AdapterFusion: members is {list(self.members)}, expected two or more different "
                'adapters, as in members=("a", "b").'
            )
        self._check_choice("query_from", ("read", "answer"))
        self._check_number("value_penalty", 0)
        self._check_number("dropout", 0, 1, open_high=True)
        self._check_number("temperature", 0)
        if not self.temperature:
            raise SettingsError("AdapterFusion: temperature is 0, expected more.")

    @property
    def fuses(self) -> tuple[Any, ...]:
        """See `Method.fuses`."""
        return tuple(m if isinstance(m, str) else Stack(*m) for m in self.members)

    def plan(self, model: nn.Module, anatomy: Anatomy, *, empty: bool = False) -> list[Graft]:
        """See `Method.plan`.

        Raises:
            SettingsError: a member isn't attached, has no bottleneck where another has one, or
                changes more than a fusion can join.
        """
        grafts: list[Graft] = []
        for place, width in self._places(model, anatomy).items():
            options = hosts.delta_options(model.get_submodule(place.input))
            delta = FusionDelta(self, width, options)
            if not empty:
                delta.start()
            grafts.append(Graft(place, delta))
        return grafts

    def count(self, model: nn.Module, anatomy: Anatomy) -> int:
        """See `Method.count`: 3 d^2 + 2 d a place, one d^2 less without V."""
        squares = 3 if self.value else 2
        return sum(squares * d * d + 2 * d for d in self._places(model, anatomy).values())

    def needs_steps(self, adapter: Any) -> bool:
        """See `Method.needs_steps`: for the penalty."""
        return self.value and self.value_penalty > 0

    def penalty(self, adapter: Any) -> Tensor | None:
        """See `Method.penalty`: lambda times the sum of ||V - I||^2."""
        if not self.needs_steps(adapter):
            return None
        values = [d.value for d in fusions(adapter).values() if d.value is not None]
        away = [
            (v - torch.eye(len(v), device=v.device, dtype=v.dtype)).square().sum() for v in values
        ]
        return self.value_penalty * torch.stack([a.to(away[0].device) for a in away]).sum()

    def heat_maps(self, adapter: Any) -> list[HeatMap]:
        """See `Method.heat_maps`: each member's mean weight in each block, once measured."""
        found = {name: delta for name, delta in fusions(adapter).items() if delta.is_measured}
        if not found:
            return []
        values = {
            f"{name}.{self._word(at)}": weight
            for name, delta in found.items()
            for at, weight in enumerate(delta.attention.tolist())
        }
        note = "Mean attention over real tokens; a column of one kind of sublayer sums to 1."
        return [HeatMap.by_block("Attention to each adapter", values, adapter.anatomy, note)]

    def _word(self, at: int) -> str:
        member = self.members[at]
        return member if isinstance(member, str) else " + ".join(member)

    def _places(self, model: nn.Module, anatomy: Anatomy) -> Mapping[SublayerPlace, int]:
        """Returns the places at which every member has a bottleneck, and their widths."""
        last = [m if isinstance(m, str) else m[-1] for m in self.members]
        every = [name for m in self.members for name in ([m] if isinstance(m, str) else m)]
        sites, others = _sites(model)
        known = sorted({name for names in (*sites.values(), *others.values()) for name in names})
        for name in every:
            if name not in known:
                raise SettingsError(
                    f'AdapterFusion: member "{name}" is not attached; attached: '
                    f"{', '.join(known) or 'none'}.{nearest(name, known)}"
                )
        _check_alone(every, others, (*anatomy.heads, *anatomy.new_heads))
        widths = {block.path: block.width for block in anatomy.blocks}
        found: dict[SublayerPlace, int] = {}
        for site, names in sites.items():
            here = [name for name in last if name in names]
            if here and len(here) < len(last):
                lacking = next(name for name in last if name not in names)
                raise SettingsError(
                    f'AdapterFusion: "{here[0]}" has a bottleneck at {site.places[here[0]].name}, '
                    f'"{lacking}" has none there: fuse adapters with the same sublayers and layers.'
                )
            if here:
                place = site.places[here[-1]]
                found[place] = widths[place.name.rpartition(".")[0]]
        if not found:
            raise SettingsError(f'AdapterFusion: "{last[0]}" has no bottleneck to fuse.')
        return found


def fusions(adapter: Any) -> dict[str, FusionDelta]:
    """Returns an adapter's fusion layers by the name of their sublayer."""
    return {g.place.name: g.delta for g in adapter.grafts if isinstance(g.delta, FusionDelta)}


Sites = dict[SublayerSite, tuple[str, ...]]


def _sites(model: nn.Module) -> tuple[Sites, dict[str, tuple[str, ...]]]:
    """Returns the adapters at each sublayer site, and at each host of other sites by its path."""
    sublayers: Sites = {}
    others: dict[str, tuple[str, ...]] = {}
    for path, module in model.named_modules():
        deltas = module._modules.get("deltas")
        for site in deltas.children() if isinstance(deltas, Deltas) else ():
            if isinstance(site, SublayerSite):
                sublayers[site] = tuple(site._modules)
            else:
                others[path] = (*others.get(path, ()), *site._modules)
    return sublayers, others


def _check_alone(
    members: Sequence[str], others: Mapping[str, Sequence[str]], heads: Sequence[str]
) -> None:
    """Raises SettingsError if a member has more than bottlenecks and a head."""
    for path, names in others.items():
        in_head = is_in(path, heads)
        for name in members if not in_head else ():
            if name in names:
                raise SettingsError(
                    f'AdapterFusion: "{name}" also changes {path or "the model"}, which a fusion '
                    "can't join: fuse adapters that are bottlenecks alone (train_norms=False)."
                )
