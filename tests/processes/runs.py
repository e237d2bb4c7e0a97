"""What a run of one, two or more processes trains, so that each can be compared with the others."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import graftune as gt
from graftune.training import training_args
from graftune.training.trainer import Trainer
from tests.families import FAMILIES
from tests.training.models import examples

ROOT = Path(__file__).parents[2]
TOGETHER = 8
"""Rows of a step, over all processes."""
STEPS = 4
CHUNK = 16
"""Tokens of which a decoder's loss is computed at once."""
METHODS: dict[str, Any] = {
    "lora": gt.LoRA(r=2),
    "houlsby": gt.HoulsbyAdapter(reduction=4),
    "prefix": gt.PrefixTuning(length=3, hidden=8),
    "adalora": gt.AdaLoRA(r=4, target_r=2),
    "lst": gt.LadderSideTuning(reduction=2),
    "bitfit": gt.BitFit(add_missing=True),
    "prompt": gt.PromptTuning(length=3),
    "full": gt.FullFineTuning(),
}
FSDP2 = {
    "fsdp": True,
    "fsdp_config": {"version": 2, "reshard_after_forward": True},
}
ZERO3 = {
    "deepspeed": {
        "zero_optimization": {"stage": 3},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": "auto",
        "train_micro_batch_size_per_gpu": "auto",
    }
}
SHARDED: dict[str, dict[str, Any]] = {"ddp": {}, "fsdp": FSDP2, "zero3": ZERO3}


def trainer(method: str, folder: Path, how: str = "ddp", **settings: Any) -> Trainer:
    """Returns a Trainer of this process's part of the run; with `loss_chunk`, of a decoder's."""
    chunk = settings.pop("loss_chunk", None)
    model = FAMILIES["llama"].build("default" if chunk else "classification", dropout=0.0)
    gt.attach(model, METHODS[method], name="task", seed=0)
    own = {"trunk_cache": settings.pop("trunk_cache", None), "loss_chunk": chunk}
    given: dict[str, Any] = {
        "per_device_train_batch_size": TOGETHER // int(os.environ.get("WORLD_SIZE", "1")),
        "max_steps": STEPS,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "linear",
        "logging_steps": 1,
        "save_steps": STEPS // 2,
        "disable_tqdm": True,
        "use_cpu": True,
        # Adam turns a gradient's rounding into a step of its own size, unless epsilon is above it.
        "adam_epsilon": 1e-4,
        **SHARDED[how],
        **settings,
    }
    rows = examples(3 * TOGETHER)
    if chunk:
        rows = [{**row, "labels": row["input_ids"]} for row in rows]
    return Trainer(
        model=model,
        args=training_args(str(folder), **given),
        train_dataset=rows,
        eval_dataset=rows[:16],
        **own,
    )


def torchrun(module: str, *arguments: str, processes: int = 2, **more: str) -> Any:
    """Runs a module in several processes, which gloo connects, and returns how it ended."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **more}
    return subprocess.run(
        [*command, "-m", module, *arguments],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
