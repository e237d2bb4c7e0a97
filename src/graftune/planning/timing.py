"""How fast this machine multiplies matrices and moves memory, from a moment's trial of both."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch

SIDE = 1024
"""Rows and columns of the matrices that are multiplied."""
MOVED = 2**24
"""Values that are added up elementwise."""
TRIAL_S = 0.1


@functools.cache
def speed(device: str, precision: str) -> tuple[float, float] | None:
    """Returns operations and bytes in a second, None if the device isn't here.

    Args:
        device: "cpu" or "cuda".
        precision: type of the matrices.
    """
    if device == "cuda" and not torch.cuda.is_available():
        return None
    dtype = getattr(torch, precision)
    a = torch.ones(SIDE, SIDE, device=device, dtype=dtype)
    x = torch.ones(MOVED, device=device, dtype=dtype)
    y = torch.empty_like(x)
    flops = 2 * SIDE**3 / _seconds(lambda: a @ a, device)
    moved = 3 * x.nbytes / _seconds(lambda: torch.add(x, x, out=y), device)
    return flops, moved


def _seconds(call: Callable[[], Any], device: str) -> float:
    """Returns the seconds of the fastest of as many calls as a moment allows."""
    call()
    best, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < TRIAL_S:
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best
