"""What two maps around a bottleneck need: phi by name, and their initial values."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "identity": lambda z: z,
}
"""phi by name."""


def start_pair(down: Tensor, up: Tensor, init: str) -> None:
    """Sets the initial values of D and U.

    "zero-up" leaves U at zero; "near-identity" draws both from N(0, 0.01^2), cut at two deviations;
    all else from N(0, 0.02^2).
    """
    if init == "zero-up":
        nn.init.kaiming_uniform_(down, a=math.sqrt(5))
        nn.init.zeros_(up)
        return
    for tensor in (down, up):
        if init == "near-identity":
            nn.init.trunc_normal_(tensor, std=0.01, a=-0.02, b=0.02)
        else:
            nn.init.normal_(tensor, std=0.02)
