"""LoRA: y = W x + s * B A x with W frozen (Hu et al. 2021, arXiv 2106.09685, section 4.1).

    x ──┬── W (frozen) ──────────┐      A (r, in): Kaiming uniform;  B (out, r): zeros
        └─ dropout ─ A ─ B ─ *s ─┴─ y   s = alpha / r, or alpha / sqrt(r) (rsLoRA, arXiv 2312.03732)

Identity at init: yes, bit for bit. Merge: W + s B A. Count: r * (in + out) per matrix.
PiSSA (arXiv 2404.02948) and OLoRA (arXiv 2406.01775) start A and B from W; here the change is
counted from that start, so W itself stays as it is. EVA (arXiv 2410.07170) starts A from data: see
`_eva`. LoftQ (arXiv 2310.08659) starts s B A from what quantising lost, in one step of the paper's,
so that the codes stay; identity at init: no. DoRA: see `Magnitude`. LoRA+: `lr_ratio`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from graftune.anatomy import Anatomy, Projection, resolve, resolve_biases
from graftune.errors import SettingsError
from graftune.methods import _eva as eva
from graftune.methods import _lora_starts as starts
from graftune.methods import _low_rank as low_rank
from graftune.methods._gate import GATES, add_gates
from graftune.methods._lora_tokens import token_embedding, token_grafts
from graftune.methods._patterns import check_patterns, check_used, value_for
from graftune.methods._weight_change import of_experts
from graftune.methods.base import Method, register
from graftune.sites import hosts, originals
from graftune.sites.base import Delta, Graft, LinearPlace
from graftune.sites.parameter import own_value

Targets = str | tuple[str, ...]
Layers = int | str | tuple[int, ...] | None


@register
@dataclass(frozen=True, kw_only=True)
class LoRA(Method):
    """Low-rank changes of linear maps, embeddings, convolutions and expert tensors.

    On 3-D expert tensors the change is of the weight itself, so `dropout` is refused there.
    """

    name: ClassVar[str] = "LoRA"
    paper: ClassVar[str] = "Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models"
    summary: ClassVar[str] = "A trained low-rank matrix beside each chosen frozen one; merges."
    default_lr: ClassVar[float] = 1e-3

    r: int = 8
    """Rank of the change."""
    alpha: float | None = None
    """Numerator of the scale; None takes r, a scale of 1."""
    dropout: float = 0.0
    """Chance that an input feature of the change is dropped in training."""
    targets: Targets = "blocks"
    """Roles, module names or one regular expression; "blocks": all linears of attention and FFN."""
    exclude: tuple[str, ...] = ()
    """Module names left out of the targets."""
    layers: Layers = None
    """Blocks to change: an index, a list, or a slice such as "6:"; None for all."""
    rslora: bool = False
    """Scale by alpha / sqrt(r)."""
    dora: bool = False
    """Train the length of each output row as well (DoRA)."""
    init: Literal["zero-B", "gaussian", "pissa", "olora", "eva", "loftq"] = "zero-B"
    """How A and B start; "eva" looks at data first, "loftq" at what quantising the base lost."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Biases trained with it: none, all of the model's, or those of its own hosts."""
    lora_bias: bool = False
    """Give B a bias of its own."""
    rank_pattern: dict[str, int] | None = None
    """Other ranks, by a pattern that ends a module's name."""
    alpha_pattern: dict[str, float] | None = None
    """Other alphas, by a pattern that ends a module's name."""
    trainable_tokens: tuple[int, ...] | dict[str, tuple[int, ...]] | None = None
    """Token ids whose embedding rows are trained; or by embedding module."""
    gate: str | None = None
    """Multiply B A x by a gate, not by s: "token", "mean", "mean-padded" or "auto"; see `_gate`."""
    gate_times_scale: bool = False
    """Let a gate multiply the scaled change."""
    lr_ratio: float | None = None
    """Learning rate of B over that of A (LoRA+, arXiv 2402.12354, about 16)."""
    eva_rho: float = 2.0
    """EVA: the largest rank over r; above 1, ranks move to where they explain more."""
    eva_tau: float = 0.99
    """EVA: cosine to what it was a batch before at which a direction has settled."""
    eva_whiten: bool = False
    """EVA: divide each direction by the root of its singular value."""

    def check(self) -> None:
        """See `Method.check`."""
        self._check_number("r", 1)
        self._check_number("dropout", 0, 1, open_high=True)
        if self.alpha is not None:
            self._check_number("alpha", 0)
        if self.lr_ratio is not None:
            self._check_number("lr_ratio", 0)
        self._check_gate()
        self._check_start()
        self._check_choice("bias", ("none", "all", "lora_only"))
        check_patterns(self.name, "rank_pattern", self.rank_pattern, 1)
        check_patterns(self.name, "alpha_pattern", self.alpha_pattern, 0)

    def _check_gate(self) -> None:
        if self.gate is None:
            return
        self._check_choice("gate", GATES)
        if self.dora or self.lora_bias or self.init not in ("zero-B", "gaussian", "eva"):
            raise SettingsError(
                f'{self.name}: gate="{self.gate}" goes with neither dora, lora_bias nor '
                f'init="pissa" or "olora".'
            )

    def _check_start(self) -> None:
        """Raises for a start that can't be, or settings of a start that isn't chosen."""
        starts.check(self.init, self.dora or self.lora_bias, self.alpha)
        self._check_choice("init", starts.STARTS)
        self._check_number("eva_rho", 1)
        self._check_number("eva_tau", 0, 1)
        for field in ("eva_rho", "eva_tau", "eva_whiten"):
            if self.init != "eva" and getattr(self, field) != getattr(LoRA, field):
                raise SettingsError(
                    f'LoRA: {field} is a setting of init="eva", found init="{self.init}".'
                )

    def scale(self, module: str) -> float:
        """Returns s for a module; 1 where a gate stands in its place."""
        if self.gate is not None and not self.gate_times_scale:
            return 1.0
        r = self.rank_of(module)
        alpha = value_for(self.alpha_pattern, module)
        alpha = alpha if alpha is not None else self.alpha
        return (r if alpha is None else alpha) / (math.sqrt(r) if self.rslora else r)

    def rank_of(self, module: str) -> int:
        """Returns r for a module."""
        r = value_for(self.rank_pattern, module)
        return self.r if r is None else int(r)

    def plan(self, model: nn.Module, anatomy: Anatomy, *, empty: bool = False) -> list[Graft]:
        """See `Method.plan`."""
        chosen = resolve(model, anatomy, self.targets, self.layers, self.exclude)
        names = [_name(projection) for projection in chosen]
        check_used(self.name, "rank_pattern", self.rank_pattern, names)
        check_used(self.name, "alpha_pattern", self.alpha_pattern, names)
        if self.init == "loftq" and not empty:
            self._check_lossy(model, chosen)
        grafts = [self._graft(model, projection, empty) for projection in chosen]
        if self.gate is not None:
            add_gates(self.gate, grafts, anatomy, empty)
        for module, ids in self._tokens(anatomy).items():
            grafts += token_grafts(model, anatomy, module, ids)
        return grafts + self._biases(model, anatomy, chosen, empty)

    def _check_lossy(self, model: nn.Module, chosen: tuple[Projection, ...]) -> None:
        if not any(hosts.is_quantised(model.get_submodule(part.module)) for part in chosen):
            raise SettingsError(
                'LoRA: init "loftq" corrects the error of a quantised base, and none of the '
                'targets is quantised; take "pissa" or "eva".'
            )

    @property
    def needs_data(self) -> bool:
        """See `Method.needs_data`: EVA does."""
        return self.init == "eva"

    def plan_on(
        self, model: nn.Module, anatomy: Anatomy, data: Iterable[Mapping[str, Tensor]]
    ) -> tuple[Method, list[Graft]]:
        """See `Method.plan_on`: EVA's start, and its ranks as patterns; see `_eva`."""
        grafts = self.plan(model, anatomy)  # refuses what doesn't fit before data are looked at
        chosen = resolve(model, anatomy, self.targets, self.layers, self.exclude)
        asked = [self.rank_of(_name(part)) for part in chosen]
        targets = eva.targets(model, anatomy, chosen, asked, self.eva_rho)
        found = eva.spectra(model, targets, data, self.eva_tau)
        names = dict(zip(map(_name, chosen), asked, strict=True))
        ranks = names | eva.shared_out(targets, found)
        method = self
        if ranks != names:
            method = self._with_ranks(ranks)
            grafts = method.plan(model, anatomy)
        for graft in grafts:
            if graft.place.module in found and isinstance(graft.delta, low_rank.LowRank):
                eva.start(graft.delta.A, found[graft.place.module], self.eva_whiten)
        return method, grafts

    def _with_ranks(self, ranks: Mapping[str, int]) -> LoRA:
        """Returns it with a rank for each name, 0 leaving it out; every scale stays as it is."""
        kept = {name: r for name, r in ranks.items() if r}
        root = 0.5 if self.rslora else 1
        alphas = {name: self.scale(name) * r**root for name, r in kept.items()}
        usual = {name: r if self.alpha is None else self.alpha for name, r in kept.items()}
        moved = {f"^{n}": a for n, a in alphas.items() if not math.isclose(a, usual[n])}
        return dataclasses.replace(
            self,
            rank_pattern={f"^{n}": r for n, r in kept.items() if r != self.r} or None,
            alpha_pattern=moved or None,
            exclude=(*self.exclude, *(name for name, r in ranks.items() if not r)),
        )

    def _biases(
        self, model: nn.Module, anatomy: Anatomy, chosen: tuple[Projection, ...], empty: bool
    ) -> list[Graft]:
        if self.bias == "none":
            return []
        own = [f"{projection.module}.bias" for projection in chosen]
        names = own if self.bias == "lora_only" else list(resolve_biases(anatomy))
        present = dict(model.named_parameters())
        return [own_value(model, n, empty=empty) for n in dict.fromkeys(names) if n in present]

    def count(self, model: nn.Module, anatomy: Anatomy) -> int:
        """See `Method.count`: r * (in + out) per matrix, of which an expert has its own.

        DoRA and `lora_bias` add out each, a trained token the width of its row, a bias its own.
        """
        total = 0
        for part in (chosen := resolve(model, anatomy, self.targets, self.layers, self.exclude)):
            host, r = model.get_submodule(part.module), self.rank_of(_name(part))
            if part.parameter != "weight":
                matrix = of_experts(host, part)
                total += matrix.lead[0] * r * (matrix.fan_in + matrix.out)
                continue
            fan_in, out = hosts.features(host)
            out = _height(part, out)
            taps = math.prod(getattr(host, "kernel_size", ()))
            total += r * (fan_in * taps + out) + (self.dora + self.lora_bias) * out
            total += 0 if self.gate is None else fan_in + 1
        for module, ids in self._tokens(anatomy).items():
            total += len(ids) * token_embedding(model, module)[1].embedding_dim
        biases = self._biases(model, anatomy, chosen, empty=True)
        return total + sum(tensor.numel() for graft in biases for _, tensor in graft.tensors())

    def _tokens(self, anatomy: Anatomy) -> dict[str, tuple[int, ...]]:
        tokens = self.trainable_tokens or {}
        return {anatomy.input_embeddings[0]: tokens} if isinstance(tokens, tuple) else tokens

    def param_groups(self, adapter: Any, lr: float) -> list[dict[str, Any]] | None:
        """Returns LoRA+'s two groups: B (and an embedding's A) learns `lr_ratio` times faster."""
        if self.lr_ratio is None:
            return None
        fast: list[Tensor] = []
        for graft in adapter.grafts:
            if isinstance(graft.delta, low_rank.LowRankEmbedding):
                fast.append(graft.delta.A)
            elif isinstance(graft.delta, low_rank.LowRank | low_rank.LowRankExperts):
                fast.append(graft.delta.B)
        known = {id(tensor) for tensor in fast}
        slow = [tensor for tensor in adapter.parameters() if id(tensor) not in known]
        return [{"params": slow, "lr": lr}, {"params": fast, "lr": lr * self.lr_ratio}]

    def _graft(self, model: nn.Module, projection: Projection, empty: bool) -> Graft:
        host = model.get_submodule(projection.module)
        r, scale = self.rank_of(_name(projection)), self.scale(_name(projection))
        if projection.parameter != "weight":
            return self._experts(host, projection, r, scale, empty)
        fan_in, out = hosts.features(host)
        out = _height(projection, out)
        taps = int(math.prod(getattr(host, "kernel_size", ())))
        self._check_rank(projection.module, r, fan_in * taps, out, empty)
        delta = self._delta(host, projection, r, scale, empty)
        if self.init == "loftq" and not empty and hosts.is_quantised(host):
            assert isinstance(delta, low_rank.LowRank)
            lost = originals.residual(model, projection.module)
            starts.start_from_residual(delta, lost, projection)
        place = LinearPlace(projection.module, projection.role, projection.rows)
        return Graft(place, delta)

    def _check_rank(self, module: str, r: int, fan_in: int, out: int, empty: bool) -> None:
        if not empty and r > min(fan_in, out):
            raise SettingsError(
                f"LoRA: r is {r}, but {module} is {out}x{fan_in}: no change of it has a rank above "
                f"{min(fan_in, out)}; set a smaller r, or one for it in rank_pattern."
            )

    def _delta(
        self, host: nn.Module, projection: Projection, r: int, scale: float, empty: bool
    ) -> Delta:
        options = hosts.delta_options(host)
        fan_in, out = hosts.features(host)
        out = _height(projection, out)
        taps = tuple(getattr(host, "kernel_size", ()))
        if getattr(host, "groups", 1) != 1:
            raise SettingsError(
                f"LoRA: {projection.module} is a grouped convolution, not supported."
            )
        A = torch.empty((r, fan_in, *taps), **options)  # type: ignore[arg-type]
        B = torch.empty((out, r, *[1] * len(taps)), **options)  # type: ignore[arg-type]
        kinds = _DORA_KINDS if self.dora else _KINDS if self.gate is None else _GATED_KINDS
        kind = hosts.kind_of(host)
        if kind not in kinds:
            raise SettingsError(f"LoRA: {projection.module} is no linear, and can't be gated.")
        delta = kinds[kind](A, B, scale, self.dropout, self.lora_bias)
        if projection.rows is not None and self.dora:
            delta.register_buffer("index", starts.indices(projection, A.device), persistent=False)
        if empty:
            starts.reserve(delta, self.init)
        else:
            starts.start(delta, self.init, host, projection)
        return delta

    def _experts(
        self, host: nn.Module, projection: Projection, r: int, scale: float, empty: bool
    ) -> Graft:
        plain = not (self.dropout or self.dora or self.lora_bias or self.gate)
        if not plain or self.init in (*starts.FROM_WEIGHT, "loftq"):
            raise SettingsError(
                f"LoRA: {projection.path} holds the weights of experts, on which dropout, dora, "
                "lora_bias, a gate and init from the weight are not possible; leave it out with "
                'targets="attention".'
            )
        matrix = of_experts(host, projection)
        self._check_rank(matrix.name, r, matrix.fan_in, matrix.out, empty)
        A, B = matrix.empty(r, matrix.fan_in), matrix.empty(matrix.out, r)
        if not empty:
            starts.start_experts(A, B, self.init)
        turned = hosts.has_turned_experts(host)
        return Graft(matrix.place, low_rank.LowRankExperts(A, B, scale, matrix.index, turned))


_KINDS: dict[str, type[low_rank.LowRank]] = {
    "linear": low_rank.LowRank,
    "embedding": low_rank.LowRankEmbedding,
    "conv": low_rank.LowRankConv,
}
_GATED_KINDS: dict[str, type[low_rank.LowRank]] = {"linear": low_rank.GatedLowRank}
_DORA_KINDS: dict[str, type[low_rank.LowRank]] = {
    "linear": low_rank.Magnitude,
    "embedding": low_rank.MagnitudeEmbedding,
    "conv": low_rank.MagnitudeConv,
}


def _height(projection: Projection, out: int) -> int:
    return out if projection.rows is None else sum(b - a for a, b in projection.rows)


def _name(projection: Projection) -> str:
    """Returns what patterns are held against: the module, or an expert tensor's own name."""
    return projection.module if projection.parameter == "weight" else projection.path
