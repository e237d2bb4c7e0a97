"""Invertible adapters: a coupling of the embeddings, taken back before the head (MAD-X; NICE).

    x = (x1, x2)      y1 = x1 + F(x2)      y2 = x2 + G(y1)           F, G: U phi(D . + c_D) + c_U
    y = (y1, y2)      x2 = y2 - G(y1)      x1 = y1 - F(x2)           k = d / 2 / reduction

Pfeiffer et al. 2020, arXiv 2005.00052, section 4.2; Dinh et al. 2015, arXiv 1410.8516.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftune.anatomy import Anatomy
from graftune.anatomy.entrance import find_entrance
from graftune.anatomy.modules import is_embedding
from graftune.errors import SettingsError
from graftune.methods._maps import ACTIVATIONS, start_pair
from graftune.sites import hosts
from graftune.sites.base import Graft, InputDelta, LinearPlace, Seen, SublayerDelta, SublayerPlace

if TYPE_CHECKING:
    from graftune.methods._bottleneck import SerialMethod


class Coupling(nn.Module):
    """Both directions.

    Shapes: F_down and G_down (k, d / 2), F_down_bias and G_down_bias (k), F_up and G_up (d / 2, k),
    F_up_bias and G_up_bias (d / 2).
    """

    def __init__(self, shapes: dict[str, tuple[int, ...]], phi: str, options: Any) -> None:
        super().__init__()
        self.phi = phi
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, **options)))

    def start(self, init: str) -> None:
        """Sets the initial values."""
        for which in "FG":
            nn.init.zeros_(self.get_parameter(f"{which}_down_bias"))
            nn.init.zeros_(self.get_parameter(f"{which}_up_bias"))
            down, up = (self.get_parameter(f"{which}_{end}") for end in ("down", "up"))
            start_pair(down, up, init)

    def forward(self, x: Tensor) -> Tensor:
        """Returns y, `(..., d)`."""
        first, second = self._halves(x)
        first = first + self._map("F", second)
        second = second + self._map("G", first)
        return torch.cat((first, second), -1).to(x.dtype)

    def inverse(self, y: Tensor) -> Tensor:
        """Returns x, `(..., d)`."""
        first, second = self._halves(y)
        second = second - self._map("G", first)
        first = first - self._map("F", second)
        return torch.cat((first, second), -1).to(y.dtype)

    def _halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        own: Any = self._parameters
        first, second = x.to(own["F_down"].dtype).chunk(2, -1)
        return first, second

    def _map(self, which: str, z: Tensor) -> Tensor:
        own: Any = self._parameters
        names = ("down", "down_bias", "up", "up_bias")
        down, down_bias, up, up_bias = (own[f"{which}_{name}"].to(z.device) for name in names)
        return F.linear(ACTIVATIONS[self.phi](F.linear(z, down, down_bias)), up, up_bias)


class Shared(nn.Module):
    """Holds the coupling, so that its tensors are named `invertible.F_down` and so on."""

    def __init__(self, coupling: Coupling) -> None:
        super().__init__()
        self.invertible = coupling


class Coupled(SublayerDelta):
    """Couples what leaves the embeddings."""

    def __init__(self, common: Shared) -> None:
        super().__init__()
        self.common = common

    def forward(self, h: Tensor, seen: Seen) -> Tensor:
        """See `SublayerDelta.forward`."""
        return self.common.invertible(h)


class Uncoupled(InputDelta):
    """Takes the coupling back before the language-model head."""

    undoes: ClassVar[bool] = True

    def __init__(self, common: Shared) -> None:
        super().__init__()
        self.common = common

    def changes(self, size: int) -> int:
        """See `Delta.changes`: none."""
        return 0

    def forward(self, x: Tensor, host: nn.Module) -> Tensor:
        """See `InputDelta.forward`."""
        return self.common.invertible.inverse(x)


def plan_coupling(
    settings: SerialMethod, model: nn.Module, anatomy: Anatomy, empty: bool
) -> list[Graft]:
    """Returns the grafts of a coupling.

    Raises:
        SettingsError: no module gives the embedded tokens, or their width doesn't fit.
    """
    path, host = _entrance(settings, model, anatomy)
    shapes = _shapes(settings, model, anatomy)
    coupling = Coupling(shapes, settings.activation, hosts.delta_options(host))
    if not empty:
        coupling.start(settings.init)
    common = Shared(coupling)
    grafts = [Graft(SublayerPlace(path, path, path), Coupled(common))]
    if settings.undo_at_head and anatomy.output_embeddings is not None:
        place = LinearPlace(anatomy.output_embeddings, side="input")
        grafts.append(Graft(place, Uncoupled(common)))
    return grafts


def coupling_count(settings: SerialMethod, model: nn.Module, anatomy: Anatomy) -> int:
    """Returns 2 (2 k d / 2 + k + d / 2)."""
    return sum(math.prod(shape) for shape in _shapes(settings, model, anatomy).values())


def _shapes(
    settings: SerialMethod, model: nn.Module, anatomy: Anatomy
) -> dict[str, tuple[int, ...]]:
    _, host = _entrance(settings, model, anatomy)
    width, head = hosts.features(host)[1], anatomy.output_embeddings
    seen = width if head is None else hosts.features(model.get_submodule(head))[0]
    if width % 2 or (settings.undo_at_head and seen != width):
        raise SettingsError(
            f"{settings.name}: invertible couples two halves of the embeddings and takes it back "
            f"before the head, but {type(model).__name__}'s embeddings are {width} wide and its "
            f"head sees {seen}: leave invertible=False."
        )
    half = width // 2
    k = max(1, int(half // settings.invertible_reduction))
    one = {"down": (k, half), "down_bias": (k,), "up": (half, k), "up_bias": (half,)}
    return {f"{which}_{name}": shape for which in "FG" for name, shape in one.items()}


def _entrance(settings: SerialMethod, model: nn.Module, anatomy: Anatomy) -> tuple[str, nn.Module]:
    """Returns where embedded tokens leave, and the embedding that they come from."""
    path = find_entrance(model, anatomy)
    if path is None:
        raise SettingsError(
            f"{settings.name}: invertible acts on token embeddings as they enter the first block, "
            f"which no module of {type(model).__name__} gives (it sees, hears, or adds positions "
            "later): leave invertible=False."
        )
    modules = map(model.get_submodule, anatomy.input_embeddings)
    return path, next(module for module in modules if is_embedding(module))
