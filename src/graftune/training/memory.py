"""Peak memory of this process and of its CUDA devices, in bytes."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # proc(5): resets VmHWM to the present size


def peak_memory_bytes() -> int:
    """Returns the peak of the CUDA devices in use, or of the process where there are none.

    Example:
        >>> peak_memory_bytes() > 0
        True
    """
    return device_peak_bytes() or process_peak_bytes()


def process_peak_bytes() -> int:
    """Returns the largest resident size of this process since its start or the last reset."""
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import psutil

    info = psutil.Process().memory_info()
    return int(getattr(info, "peak_wset", 0)) or _maximum_rss()


def device_peak_bytes() -> int:
    """Returns what torch has held at most on all CUDA devices together; 0 where none is in use."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return 0
    return sum(torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count()))


def reset_peak_memory() -> None:
    """Starts both peaks anew, where the system allows it (Linux, CUDA)."""
    with contextlib.suppress(OSError):  # not Linux, or a container that forbids it: the peak stays
        _CLEAR.write_text(_RESET_PEAK)
    if device_peak_bytes():
        import torch

        for index in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(index)


def _maximum_rss() -> int:
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
