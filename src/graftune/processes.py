"""The processes of one run, as torchrun or accelerate starts them: which one this is, and waiting.

Nothing here loads torch unless there are several. What one tells the others goes as JSON.
"""

from __future__ import annotations

import json
import os
from typing import Any

from graftune.errors import SettingsError

FAILED = "graftune/failed"


def count() -> int:
    """Returns how many processes the run has."""
    return max(1, _number("WORLD_SIZE", 1))


def rank() -> int:
    """Returns the number of this process, from 0."""
    return _number("RANK", 0) if count() > 1 else 0


def is_first() -> bool:
    """Whether this is the process that prints and writes."""
    return rank() == 0


def start() -> None:
    """Connects the processes, if there are several; again, it changes nothing."""
    if count() > 1:
        from accelerate import PartialState
        from accelerate.utils import is_cuda_available

        PartialState(cpu=not is_cuda_available())


def refuse_several(what: str) -> None:
    """Raises SettingsError where a run has several processes, which something isn't for."""
    if count() > 1:
        raise SettingsError(f"{what} are for one process, and there are {count()}: run them alone.")


def stop() -> None:
    """Disconnects the processes, once all have come so far."""
    if _connected():
        wait()
        import torch.distributed as dist

        dist.destroy_process_group()


def wait() -> None:
    """Waits until every process is here."""
    told(None)


def told(value: Any) -> Any:
    """Returns, in every process, what the first one gave: plain values, as JSON has them."""
    if not _connected():
        return value
    import torch
    import torch.distributed as dist

    raw = json.dumps(value).encode() if is_first() else b""
    size = torch.tensor([len(raw)], device=_device())
    dist.broadcast(size, 0)
    text = torch.empty(int(size), dtype=torch.uint8, device=_device())
    if is_first():
        text.copy_(torch.frombuffer(bytearray(raw), dtype=torch.uint8))
    dist.broadcast(text, 0)
    return json.loads(text.cpu().numpy().tobytes())


def any_of(claim: bool) -> bool:
    """Returns, in every process, whether a claim holds in some process."""
    if not _connected():
        return claim
    import torch
    import torch.distributed as dist

    found = torch.tensor([int(claim)], device=_device())
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return bool(found.item())


def is_first_to_fail() -> bool:
    """Whether no other process has said yet why the run fails; true for one process at most."""
    if not _connected():
        return is_first()
    from torch.distributed import distributed_c10d

    # The store of torchrun's agent outlives every process, so the last one can still ask it.
    store: Any = distributed_c10d._get_default_store()  # pyright: ignore[reportPrivateUsage]
    return store.add(FAILED, 1) == 1


def _connected() -> bool:
    if count() == 1:
        return False
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized()


def _device() -> Any:
    """Returns where tensors lie that processes exchange: NCCL has no others than the GPU's."""
    import torch
    import torch.distributed as dist

    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdigit() else default
