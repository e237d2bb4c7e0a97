"""Compacter: adapters whose maps are sums of Kronecker products (Mahabadi et al. 2021).

    A(h) = h + U phi(D h + c_D) + c_U,  Houlsby's places           phi = gelu, k = d / 32
    D = sum_i (P_i (x) W_i)^T,  U likewise          P_i (n, n), one rule for all maps;  n = 4
    W_i = L_i R_i           L_i (in / n, p), R_i (p, out / n) each map's own;  p = 1

P ~ N(0, 1e-4^2), L and R Glorot-uniform, biases 0: near the identity (`init="zero-up"` is equal to
it). The model's norms are trained too. Compacter++ leaves attention out. Merge: no.
Count: p (2 d + 2 k) + d + k for each place, n^3, and the norms. arXiv 2106.04647, section 4.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from graftune.anatomy import Anatomy
from graftune.anatomy.ports import Sublayer
from graftune.errors import SettingsError
from graftune.methods._bottleneck import BottleneckDelta, SerialMethod
from graftune.methods.base import register
from graftune.sites.base import Graft

Shapes = dict[str, tuple[int, ...]]


class SharedMaps(nn.Module):
    """What all deltas of an adapter share: the rule, and the factors with `shared_W_phm`.

    Shapes: phm_rule (n, n, n), or phm_rule_left (n, n, 1) and phm_rule_right (n, 1, n); factors as
    in `KroneckerDelta`.
    """

    def __init__(self, learned: Shapes, fixed: Shapes, options: Any) -> None:
        super().__init__()
        _register(self, learned, fixed, options)


class KroneckerDelta(BottleneckDelta):
    """A serial bottleneck whose maps are put together from factors in each pass.

    Shapes: down_left (n, d / n, p), down_right (n, p, k / n), up_left (n, k / n, p), up_right
    (n, p, d / n), or down (n, d / n, k / n) and up (n, k / n, d / n); down_bias (k), up_bias (d);
    down_rule and up_rule as the shared rule, where each map has its own; others as in
    `BottleneckDelta`.
    """

    common: SharedMaps
    """There if any tensor is shared."""
    down_bias: nn.Parameter

    def maps(self) -> tuple[Tensor, Tensor]:
        """See `BottleneckDelta.maps`."""
        return self.map("down"), self.map("up")

    def map(self, which: str) -> Tensor:
        """Returns sum_i (P_i (x) W_i)^T, `(out, in)`."""
        device = self.down_bias.device  # an adapter may lie on several
        W = self._product(which).to(device)
        P = self._product(f"{which}_rule", "phm_rule").to(device)
        return torch.einsum("iab,ice->beac", P, W).flatten(2).flatten(0, 1)

    def _product(self, *names: str) -> Tensor:
        """Returns the first tensor there is by one of the names, whole or as left times right."""
        for name in names:
            whole = self._tensor(name)
            if whole is not None:
                return whole
            left, right = self._tensor(f"{name}_left"), self._tensor(f"{name}_right")
            if left is not None and right is not None:
                return left @ right
        raise AssertionError(names)

    def _tensor(self, name: str) -> Tensor | None:
        for home in (self, self._modules.get("common")):
            if home is not None and (name in home._parameters or name in home._buffers):
                return home._parameters.get(name, home._buffers.get(name))
        return None

    def start_maps(self, init: str) -> None:
        """See `BottleneckDelta.start_maps`; a rule of its own deviates by 0.01, as published."""
        start({**self._parameters, **self._buffers}, init, self.rule_deviation or 0.01)

    rule_deviation: float | None = None


@register
@dataclass(frozen=True, kw_only=True)
class Compacter(SerialMethod):
    """Houlsby adapters with maps made of Kronecker products, one rule for all of them.

    Merge: not possible, the bottleneck isn't linear.
    """

    name: ClassVar[str] = "Compacter"
    paper: ClassVar[str] = (
        "Mahabadi et al. 2021, Compacter: Efficient Low-Rank Hypercomplex Adapter Layers"
    )
    summary: ClassVar[str] = "Houlsby adapters out of Kronecker products; 0.07 % of T5."
    default_lr: ClassVar[float] = 3e-3
    inits: ClassVar[tuple[str, ...]] = ("near-identity", "adapterhub", "zero-up")

    sublayers: tuple[str, ...] = ("attention", "ffn")
    """Which get one: "attention", "cross-attention", "ffn"."""
    reduction: float | dict[str, float] = 32
    """d over k; or by index of the block, "default" for the others."""
    activation: str = "gelu"
    """phi: relu, gelu, gelu_tanh, silu, tanh, sigmoid, leaky_relu, elu or identity."""
    init: str = "near-identity"
    """Of L and R: "near-identity" Glorot-uniform as published, "adapterhub" Glorot-normal without
    its gain, "zero-up" equals the base."""
    train_norms: bool = True
    """Train the model's own norms with it, as the paper does; AdapterHub doesn't."""
    phm_dim: int = 4
    """n, the number of products that are summed; it divides d and k."""
    phm_rank: int = 1
    """p, the rank of each W."""
    shared_phm_rule: bool = True
    """One P for all maps; else each map has its own."""
    factorized_phm_rule: bool = False
    """Make P out of vectors, (n, n, 1) times (n, 1, n)."""
    factorized_phm_W: bool = True
    """Make W out of L and R; else it is trained whole."""
    shared_W_phm: bool = False
    """One set of W for all places."""
    learn_phm: bool = True
    """Train P; else it stays as it was drawn."""
    phm_init_range: float | None = None
    """Deviation of P's initial values; None for 1e-4 if it is shared, else 0.01."""

    def check(self) -> None:
        """See `Method.check`."""
        super().check()
        for field in ("phm_dim", "phm_rank"):
            self._check_number(field, 1)
        if self.phm_init_range is not None and not 0 < self.phm_init_range < math.inf:
            raise SettingsError(
                f"{self.name}: phm_init_range is {self.phm_init_range!r}, expected more than 0: "
                "without P no other tensor gets a gradient."
            )

    def map_shapes(self, width: int, k: int) -> Shapes:
        """See `BottleneckMethod.map_shapes`: what a place has of its own."""
        shapes: Shapes = {"down_bias": (k,), "up_bias": (width,)}
        if not self.shared_W_phm:
            shapes |= self.factor_shapes(width, k)
        if self.learn_phm and not self.shared_phm_rule:
            shapes |= self.rule_shapes("down_rule") | self.rule_shapes("up_rule")
        return shapes

    def factor_shapes(self, width: int, k: int) -> Shapes:
        """Returns the shapes of the factors of both maps."""
        n, p = self.phm_dim, self.phm_rank
        outer, inner = width // n, k // n
        if not self.factorized_phm_W:
            return {"down": (n, outer, inner), "up": (n, inner, outer)}
        down = {"down_left": (n, outer, p), "down_right": (n, p, inner)}
        return {**down, "up_left": (n, inner, p), "up_right": (n, p, outer)}

    def rule_shapes(self, name: str) -> Shapes:
        """Returns the shapes of a rule."""
        n = self.phm_dim
        if self.factorized_phm_rule:
            return {f"{name}_left": (n, n, 1), f"{name}_right": (n, 1, n)}
        return {name: (n, n, n)}

    def plan(self, model: nn.Module, anatomy: Anatomy, *, empty: bool = False) -> list[Graft]:
        """See `Method.plan`.

        Raises:
            SettingsError: a width that n doesn't divide, or W shared by places of several widths.
        """
        learned, fixed = self._shared(model, anatomy)
        grafts = super().plan(model, anatomy, empty=empty)
        deltas = [g.delta for g in grafts if isinstance(g.delta, KroneckerDelta)]
        if learned or fixed:
            first = deltas[0].down_bias
            options = {"device": first.device, "dtype": first.dtype}
            common = SharedMaps(learned, fixed, options)
            if not empty:
                own = {**common._parameters, **common._buffers}
                start(own, self.init, self.phm_init_range or 1e-4)
            for delta in deltas:
                delta.common = common
        return grafts

    def count(self, model: nn.Module, anatomy: Anatomy) -> int:
        """See `Method.count`: p (2 d + 2 k) + d + k for each place, n^3 once, norms."""
        learned, _ = self._shared(model, anatomy)
        return super().count(model, anatomy) + sum(math.prod(s) for s in learned.values())

    def delta(self, width: int, k: int, options: Any) -> BottleneckDelta:
        """See `BottleneckMethod.delta`."""
        delta = KroneckerDelta(self, width, k, options)
        if not self.learn_phm and not self.shared_phm_rule:
            fixed = self.rule_shapes("down_rule") | self.rule_shapes("up_rule")
            _register(delta, {}, fixed, options)
        delta.rule_deviation = self.phm_init_range
        return delta

    def _shared(self, model: nn.Module, anatomy: Anatomy) -> tuple[Shapes, Shapes]:
        """Returns the shapes of what all places share: what is learned, and what isn't."""
        rule = self.rule_shapes("phm_rule") if self.shared_phm_rule else {}
        learned, fixed = (rule, {}) if self.learn_phm else ({}, rule)
        if self.shared_W_phm:
            sizes = {(s.block.width, k) for s, _, k in self.places(model, anatomy)}
            if len(sizes) > 1:
                raise SettingsError(
                    f"{self.name}: shared_W_phm needs one width and one bottleneck for all places, "
                    f"found {sorted(sizes)}: leave shared_W_phm=False."
                )
            learned = learned | self.factor_shapes(*sizes.pop())
        return learned, fixed

    def _width(self, sublayer: Sublayer) -> int:
        n, width, k = self.phm_dim, sublayer.block.width, super()._width(sublayer)
        if width % n:
            raise SettingsError(
                f"{self.name}: phm_dim={n} doesn't divide the width {width} of {sublayer.name}: "
                f"the nearest that does is {_nearest_divisor(width, n)}."
            )
        if k % n:
            fits = max(n, round(k / n) * n)
            by = f", reduction={width / fits:g}" if width % fits == 0 else ""
            raise SettingsError(
                f"{self.name}: phm_dim={n} doesn't divide the bottleneck {k} of {sublayer.name}, "
                f"of width {width}: the nearest that fits is bottleneck={fits}{by}."
            )
        return k


@register
@dataclass(frozen=True, kw_only=True)
class CompacterPlusPlus(Compacter):
    """Compacter after the feed-forward alone.

    Merge: not possible, the bottleneck isn't linear.
    """

    name: ClassVar[str] = "CompacterPlusPlus"
    summary: ClassVar[str] = "Compacter after FFN alone; 0.05 % of T5."

    sublayers: tuple[str, ...] = ("ffn",)
    """Which get one: "attention", "cross-attention", "ffn"."""


def start(tensors: Mapping[str, Tensor | None], init: str, deviation: float) -> None:
    """Sets the initial values of rules and factors; others are left."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if "rule" in name:
            nn.init.normal_(tensor, std=deviation)
        elif tensor.ndim == 3:
            for part in tensor:  # a view each: Glorot's bound is that of one W, L or R
                _start_factor(part, init)
    if init == "zero-up":
        for name in ("up", "up_right"):
            last = tensors.get(name)
            if last is not None:
                nn.init.zeros_(last)


def _start_factor(part: Tensor, init: str) -> None:
    if init == "adapterhub":
        nn.init.xavier_normal_(part)
    else:
        nn.init.xavier_uniform_(part, gain=math.sqrt(2))


def _register(module: nn.Module, learned: Shapes, fixed: Shapes, options: Any) -> None:
    for name, shape in learned.items():
        module.register_parameter(name, nn.Parameter(torch.empty(shape, **options)))
    for name, shape in fixed.items():
        module.register_buffer(name, torch.empty(shape, **options))


def _nearest_divisor(width: int, n: int) -> int:
    divisors = [k for k in range(1, width + 1) if width % k == 0]
    return min(divisors, key=lambda k: abs(k - n))
