"""What each process of the tests does: the jobs that it is given, one after another.

torchrun --nproc-per-node 2 -m tests.processes.worker FOLDER HOW:METHOD[:RESUMED FROM] ...
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from accelerate import state
from transformers import TrainerCallback

import graftune as gt
from graftune import processes
from graftune.errors import GraftuneError
from tests.processes.runs import CHUNK, trainer


def shard_on_cpus() -> None:
    """Lets accelerate shard over CPUs, which FSDP2 can and accelerate leaves to accelerators."""
    plain = state.AcceleratorState.__init__

    def made(self: Any, *rest: Any, fsdp_plugin: Any = None, **settings: Any) -> None:
        plain(self, *rest, fsdp_plugin=fsdp_plugin, **settings)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = state.DistributedType.FSDP, fsdp_plugin

    state.AcceleratorState.__init__ = made  # type: ignore[method-assign]


class Killed(TrainerCallback):
    """Ends the last process as the kernel does, without a word, after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step and processes.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def job(folder: Path, text: str) -> dict[str, Any]:
    """Does one job and returns what it found."""
    how, method, *rest = text.split(":")
    name = f"{how}-{method}"
    more: dict[str, Any] = {"trunk_cache": True} if "cached" in rest else {}
    more |= {"loss_chunk": CHUNK} if "chunked" in rest else {}
    if "best" in rest:
        more |= {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    run = trainer(method, folder / name, how, **more)
    if "killed" in rest:
        run.add_callback(Killed(3))
    resumed = next((part for part in rest if part.startswith("from=")), None)
    try:
        run.train(resume_from_checkpoint=folder / resumed[5:] if resumed else None)
    except GraftuneError as error:
        return {"error": str(error)}
    kinds = [kind for kind in ("cached", "best", "chunked") if kind in rest] + ["resumed"] * bool(
        resumed
    )
    place = folder / "-".join((name, *kinds))
    run.save_model(str(place / "adapter"))
    if "own" in rest:
        gt.adapters(run.model)["task"].save(place / "saved")
    rows = [row["loss"] for row in run.state.log_history if "loss" in row]
    return {"loss": run.evaluate()["eval_loss"], "losses": rows, "trunk": run.trunk_summary}


if __name__ == "__main__":
    shard_on_cpus()
    into = Path(sys.argv[1])
    for one in sys.argv[2:]:
        found = job(into, one)
        (into / f"{one.replace('/', '_')}.{processes.rank()}.json").write_text(json.dumps(found))
    processes.stop()
