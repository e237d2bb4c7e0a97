"""Trains some steps in earnest, in a process of its own, and says what they took at most.

    python -m graftune.planning.measuring < settings.json

The weights are random: memory doesn't ask what numbers there are. On the CPU it is how far the
process rises over its loaded model (/proc, Linux alone), its allocator told to give back at once
what is freed, so that what it holds is what is alive; on CUDA what torch says.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graftune.adapter import Adapter, attach
from graftune.errors import SettingsError
from graftune.methods.base import Method
from graftune.planning import optimizers, steps
from graftune.planning.batches import batch_of
from graftune.planning.planned import Plan, dtype_of
from graftune.planning.settings import PlanSettings
from graftune.planning.skeletons import Base, base_of, random_model

STEPS = 3
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_TOP_PAD_": "0",
    "MALLOC_ARENA_MAX": "1",
}
"""Tells glibc to hand blocks back to the system when they are freed."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """What steps took in earnest."""

    rise_bytes: int
    """How far the peak was above the loaded model."""
    seconds_per_step: float


def measure(plan: Plan, config: Any) -> Measured:
    """Trains a few steps of a plan in a fresh process, on the device that it is for.

    Args:
        plan: whose peak is asked.
        config: the model's configuration.

    Raises:
        SettingsError: the device isn't here, or the steps fail; their error is told.
    """
    _check(plan.settings)
    told = {
        "config": config.to_dict(),
        "task": plan.task,
        "method": plan.method.to_dict(),
        "settings": dataclasses.asdict(plan.settings),
    }
    done = subprocess.run(
        [sys.executable, "-m", "graftune.planning.measuring"],
        input=json.dumps(told, default=str),
        env=os.environ | ALLOCATOR | {"TRANSFORMERS_VERBOSITY": "error"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it was killed, perhaps for its memory"])[-1]
        raise SettingsError(f"the steps of the check didn't run: {last}")
    return Measured(**json.loads(done.stdout.strip().splitlines()[-1]))


def _check(settings: PlanSettings) -> None:
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise SettingsError("a check needs the device that the plan is for, and there is no CUDA.")
    if settings.device == "cpu" and not Path("/proc/self/clear_refs").exists():
        raise SettingsError("a check on the CPU reads /proc, which this system hasn't.")
    if settings.quantize or settings.offload or settings.optimizer in optimizers.KEPT:
        raise SettingsError(
            "a check trains without quantisation, offloading and 8-bit or paged optimizers: plan "
            "it without them to check the rest."
        )


def trained(base: Base, method: Method, settings: PlanSettings) -> Measured:
    """Trains steps in this process and returns what they took."""
    import time

    torch.manual_seed(0)
    model: Any = random_model(base, dtype_of(settings))
    model.to(settings.device)
    one = dataclasses.replace(settings, batch_size=1)
    data = [_on(batch_of(base, model, one), settings)] if method.needs_data else None
    adapter = attach(model, method, seed=0, data=data)
    adapter.begin(steps.STEPS)
    model.train()
    if settings.gradient_checkpointing:
        steps.checkpoint(model)
    batch = _on(batch_of(base, model, one), settings)
    _pass(model, adapter, batch, settings)  # loads what kernels load once
    model.zero_grad()
    small = nn.Parameter(torch.zeros(8, 8, device=settings.device))
    optimizers.Run([small], settings)  # and what optimizers import when they first step
    del batch
    gc.collect()
    floor = _reset(settings)
    began = time.perf_counter()
    _steps(base, model, adapter, settings)
    return Measured(_peak(settings) - floor, (time.perf_counter() - began) / STEPS)


def _steps(base: Base, model: Any, adapter: Adapter, settings: PlanSettings) -> None:
    parameters = [one for one in model.parameters() if one.requires_grad]
    optimizer = optimizers.made(parameters, settings)
    batch = _on(batch_of(base, model, settings), settings)
    for _ in range(STEPS):
        for _ in range(settings.accumulation):
            _pass(model, adapter, batch, settings)
        if settings.max_grad_norm:
            nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()


def _pass(model: Any, adapter: Adapter, batch: Any, settings: PlanSettings) -> None:
    with steps.chunked(model, settings):
        loss = steps.loss_of(model, batch, settings, settings.device) + adapter.penalty()
    loss.backward()


def _on(batch: dict[str, Any], settings: PlanSettings) -> dict[str, Any]:
    return {name: tensor.to(settings.device) for name, tensor in batch.items()}


def _reset(settings: PlanSettings) -> int:
    """Starts the peak anew; returns what is in use now."""
    if settings.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): VmHWM to the present size
    return _status("VmRSS")


def _peak(settings: PlanSettings) -> int:
    return torch.cuda.max_memory_allocated() if settings.device == "cuda" else _status("VmHWM")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def main() -> None:
    """Reads what to train from standard input, and prints what it took."""
    told = json.loads(sys.stdin.read())
    settings = PlanSettings(**told["settings"])
    base = base_of(told["config"], told["task"], settings.labels)
    print(json.dumps(dataclasses.asdict(trained(base, Method.from_dict(told["method"]), settings))))


if __name__ == "__main__":
    main()
