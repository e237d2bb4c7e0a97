"""Hard-concrete gates on a change of the model's own tensors (Louizos et al. 2018, section 2.2).

    delta = z_g z * w;   z = clamp(s (r - l) + l, 0, 1);   s = sigmoid((alpha + log u/(1-u)) / tau)

u is uniform on (0, 1), drawn once for each training pass of the model; without noise
s = sigmoid(alpha). A gate isn't shut with probability sigmoid(alpha - tau log(-l/r)).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from graftune.methods._sparse import added
from graftune.sites.base import ParameterDelta

EDGE = 1e-4
"""How near to 0 and 1 the noise comes, as in the released code of diff pruning."""
FIXED = 1e4
"""|alpha| of a gate that is fixed: z is 0 or 1 exactly, whatever the noise, and so is its slope."""


@dataclass(frozen=True)
class Gates:
    """The stretch (l, r) and the temperature tau of a set of gates."""

    lower: float
    upper: float
    temperature: float

    @property
    def offset(self) -> float:
        """What alpha is compared with: tau log(-l/r)."""
        return self.temperature * math.log(-self.lower / self.upper)

    def opened(self, alpha: Tensor, noise: Tensor | None = None) -> Tensor:
        """Returns z, from 0 to 1; `noise` is logistic, and overwritten."""
        s = torch.sigmoid(alpha) if noise is None else self._noisy(alpha, noise)
        low = s.new_tensor(self.lower)
        return torch.add(low, s, alpha=self.upper - self.lower, out=s).clamp_(0.0, 1.0)

    def _noisy(self, alpha: Tensor, noise: Tensor) -> Tensor:
        s = noise.add_(alpha)
        return (s if self.temperature == 1.0 else s.div_(self.temperature)).sigmoid_()

    def slope(self, z: Tensor, noisy: bool) -> Tensor:
        """Returns dz/dalpha: 0 where z is clamped, else s (1 - s) (r - l) / tau."""
        low, high = self.lower, self.upper
        scale = 1.0 / ((high - low) * (self.temperature if noisy else 1.0))
        slope = (z * -scale).add_((low + high) * scale).mul_(z).sub_(low * high * scale)
        return _where_inside(slope, z)  # of (z - l) (r - z) scale

    def probability(self, alpha: Tensor) -> Tensor:
        """Returns P(z > 0) of each gate; differentiable."""
        return torch.sigmoid(alpha - self.offset if self.offset else alpha)


def _where_inside(gradient: Tensor, z: Tensor) -> Tensor:
    """Returns the gradient where 0 < z < 1, else 0; one pass, where a mask would take four."""
    backward = cast(Any, torch.ops.aten).hardtanh_backward
    return cast(Tensor, backward(gradient, z, 0.0, 1.0))


class _Gated(torch.autograd.Function):
    """theta + z_g z w; of what it computes, z alone is kept for the way back."""

    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,
        w: Tensor,
        alpha: Tensor,
        group: Tensor | None,
        noise: Tensor | None,
        gates: Gates,
    ) -> Tensor:
        """Returns the changed tensor, in `value`'s dtype.

        Args:
            ctx: what the way back reads.
            value: theta, in any floating dtype.
            w: the change, of theta's shape.
            alpha: its gates, of theta's shape.
            group: z_g, a scalar, or None for 1.
            noise: log u/(1-u), of theta's shape, which is overwritten; None for none.
            gates: their stretch and temperature.
        """
        ctx.noisy = noise is not None
        z = gates.opened(alpha, noise)
        ctx.save_for_backward(w, z, group)
        ctx.gates, ctx.dtype = gates, value.dtype
        scaled = w if group is None else w * group
        return torch.addcmul(value.to(w.dtype), scaled, z).to(value.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Returns the gradients of theta, w, alpha and z_g; noise and settings have none."""
        w, z, group = ctx.saved_tensors
        wide = gradient.to(w.dtype)
        by_alpha = ctx.gates.slope(z, ctx.noisy).mul_(wide).mul_(w)
        by_w = wide * z
        by_group = None
        if group is not None:
            by_group = torch.dot(by_w.reshape(-1), w.reshape(-1))
            by_alpha.mul_(group)
            by_w.mul_(group)
        return gradient, by_w, by_alpha, by_group, None, None


class GatedChange(ParameterDelta):
    """theta + z_g z * w, every entry with a gate of its own, and one for the tensor as a group.

    Two passes of the model that are differentiated together and checkpointed would recompute the
    first with the second's noise: differentiate them one after the other.

    Shapes: w, alpha as the tensor; group () or absent; is_fixed () bool.
    """

    resumes: ClassVar[tuple[str, ...]] = ("is_fixed",)
    w: nn.Parameter
    alpha: nn.Parameter
    group: nn.Parameter | None
    is_fixed: Tensor

    def __init__(self, w: Tensor, alpha: Tensor, group: Tensor | None, gates: Gates) -> None:
        super().__init__()
        self.w, self.alpha = nn.Parameter(w), nn.Parameter(alpha)
        self.register_parameter("group", None if group is None else nn.Parameter(group))
        self.register_buffer("is_fixed", w.new_zeros((), dtype=torch.bool), persistent=False)
        self.gates = gates
        self.seed = 0
        self.is_noisy = False
        self.open: tuple[int, Tensor] | None = None

    def begin_forward(self) -> None:
        """See `Delta.begin_forward`: draws the noise's seed; once fixed, notes the open gates."""
        self.is_noisy = not bool(self.is_fixed)
        version = self.alpha._version
        if self.is_noisy:
            self.open = None
            self.seed = int(torch.randint(1 << 62, (), device="cpu"))
        elif self.open is None or self.open[0] != version:
            self.open = version, self.kept()

    def forward(self, value: Tensor | None, base: Tensor | None) -> Tensor:
        """See `ParameterDelta.forward`: with noise in training, the gates' own values else.

        Fixed gates get no gradient, so that an optimizer leaves their alphas alone.
        """
        assert value is not None
        if self.training and self.open is not None:
            at = self.open[1].to(value.device)
            return added(value, at, self.w.reshape(-1).index_select(0, at))
        noise, alone = self._noise() if self.training and self.is_noisy else (None, None)
        return _Gated.apply(value, self.w, self.alpha, self._group(alone), noise, self.gates)  # pyright: ignore[reportUnknownMemberType,reportUnknownVariableType,reportReturnType]

    @torch.compiler.disable()  # pyright: ignore[reportUntypedFunctionDecorator]
    def _noise(self) -> tuple[Tensor, Tensor]:
        """Returns logistic noise for the entries and for the group, the same for the same seed."""
        w = self.w
        generator = torch.Generator(w.device).manual_seed(self.seed)
        drawn = [w.new_empty(shape).uniform_(generator=generator) for shape in (w.shape, ())]
        entries, group = (u.logit_(eps=EDGE) for u in drawn)
        return entries, group

    def _group(self, noise: Tensor | None) -> Tensor | None:
        """Returns z_g, differentiable, or None without groups."""
        if self.group is None:
            return None
        gates = self.gates
        s = self.group if noise is None else (self.group + noise) / gates.temperature
        return (torch.sigmoid(s) * (gates.upper - gates.lower) + gates.lower).clamp(0.0, 1.0)

    @torch.no_grad()
    def change(self) -> Tensor:
        """Returns delta without noise."""
        z, group = self.gates.opened(self.alpha), self._group(None)
        return z.mul_(self.w) if group is None else z.mul_(self.w).mul_(group)

    @torch.no_grad()
    def fix(self, positions: Tensor) -> None:
        """Opens the gates at some flat positions for good, shuts the others; delta stays there."""
        change = self.change().reshape(-1)
        for tensor, inside, outside in (
            (self.w, change.index_select(0, positions), 0.0),
            (self.alpha, FIXED, -FIXED),
        ):
            flat = torch.full_like(change, outside)
            flat[positions] = inside
            tensor.copy_(flat.view(tensor.shape))
        if self.group is not None:
            self.group.fill_(FIXED)
        self.is_fixed.fill_(True)

    @torch.no_grad()
    def kept(self) -> Tensor:
        """Returns the flat positions of the open gates, once they are fixed."""
        return (self.alpha.reshape(-1) > 0).nonzero().flatten()

    def expected(self) -> tuple[Tensor, Tensor | None]:
        """Returns the expected number of open entries, and the probability that the group is."""
        group = None if self.group is None else self.gates.probability(self.group)
        return self.gates.probability(self.alpha).sum(), group
