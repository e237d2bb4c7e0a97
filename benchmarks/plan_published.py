"""Plans beside the memory that HF PEFT's README publishes, for one A100 of 80 GB.

python -m benchmarks.plan --published

The README's scripts (LoRA of rank 8, alpha 32, dropout 0.1 on RAFT's twitter_complaints) train in
float32 with AdamW, in batches of 8, without clipping. bloomz-7b1 is given rows of 64 tokens. The
two encoder-decoders are given tweets padded to the longest of their batch: taken here as 64 tokens,
with answers of 4. Their checkpoints have a language-modelling head of their own, which transformers
ties to the embeddings when it makes the model of a configuration: its bytes are added (`HEADS`).

The third column is DeepSpeed ZeRO-3 with parameters and optimizer on the CPU. On the GPU it keeps,
by its defaults, 10^9 gathered parameters and a bucket of 5*10^8 gradients, and the largest tensor
twice while it is gathered; a plan has it once, so `BUFFERS` and one more are added.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import graftune as gt

GB = 10**9
MEMORY = 80 * GB
BUFFERS = 4 * (10**9 + 5 * 10**8)
T5_LIKE = {
    "d_kv": 64,
    "num_layers": 24,
    "feed_forward_proj": "gated-gelu",
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
    "dropout_rate": 0.1,
}
MODELS: dict[str, dict[str, Any]] = {
    "T0_3B": {
        **T5_LIKE,
        "model_type": "t5",
        "d_model": 2048,
        "d_ff": 5120,
        "num_heads": 32,
        "vocab_size": 32128,
    },
    "bloomz-7b1": {
        "model_type": "bloom",
        "hidden_size": 4096,
        "n_layer": 30,
        "n_head": 32,
        "vocab_size": 250880,
    },
    "mt0-xxl": {
        **T5_LIKE,
        "model_type": "mt5",
        "d_model": 4096,
        "d_ff": 10240,
        "num_heads": 64,
        "vocab_size": 250112,
    },
}
PARAMETERS = {
    "T0_3B": 2_849_757_184,
    "bloomz-7b1": 7_069_016_064,
    "mt0-xxl": 12_921_057_280,
}
"""Parameters of the published checkpoints."""
HEADS = {"T0_3B": 32128 * 2048, "bloomz-7b1": 0, "mt0-xxl": 250112 * 4096}
"""Parameters of heads that the checkpoints have untied."""
LARGEST = {"T0_3B": 32128 * 2048, "bloomz-7b1": 250880 * 4096, "mt0-xxl": 250112 * 4096}
"""Parameters of the largest tensor."""
FULL, LORA, OFFLOADED = "full", "LoRA", "LoRA, DeepSpeed and CPU offload"
PUBLISHED: dict[tuple[str, str], float | None] = {
    ("T0_3B", FULL): 47.14,
    ("T0_3B", LORA): 14.4,
    ("T0_3B", OFFLOADED): 9.8,
    ("bloomz-7b1", FULL): None,
    ("bloomz-7b1", LORA): 32,
    ("bloomz-7b1", OFFLOADED): 18.1,
    ("mt0-xxl", FULL): None,
    ("mt0-xxl", LORA): 56,
    ("mt0-xxl", OFFLOADED): 22,
}
"""GB on the GPU; None: out of memory."""
CPU = {"T0_3B": (2.96, 17.8), "bloomz-7b1": (3.8, 35), "mt0-xxl": (3, 52)}
"""GB of the process that trains LoRA on the GPU alone, and of the one that offloads."""


@dataclass(frozen=True)
class Reproduced:
    """A published figure and what a plan says, GB."""

    model: str
    how: str
    published: float | None
    planned: float
    host: float
    parameters: int

    @property
    def off(self) -> float | None:
        """How far the plan is off, as a share; None where nothing was published but "too much"."""
        return None if self.published is None else self.planned / self.published - 1


def reproduced(model: str, how: str) -> Reproduced:
    """Returns a row: the GPU's peak, and the host's part of what was moved there."""
    targets = "query_key_value" if model == "bloomz-7b1" else "qv"
    lora = gt.LoRA(r=8, alpha=32, dropout=0.1, targets=targets)
    offload = "parameters,optimizer" if how == OFFLOADED else None
    plan = gt.plan(
        MODELS[model],
        gt.FullFineTuning() if how == FULL else lora,
        batch_size=8,
        length=64,
        target_length=4,
        device="cuda",
        max_grad_norm=0.0,
        offload=offload,
    )
    head = 4 * HEADS[model]
    planned, host = plan.peak_bytes, plan.host_bytes
    if how == OFFLOADED:
        planned, host = planned + BUFFERS + 4 * LARGEST[model], host + head
    else:  # a head that trains has a gradient and two states beside it
        planned += head * (4 if how == FULL else 1)
    counted = plan.base_parameters + HEADS[model]
    return Reproduced(model, how, PUBLISHED[model, how], planned / GB, host / GB, counted)


def show() -> None:
    """Prints the table."""
    print("| model | training | published, GB | planned, GB | off |")
    print("|---|---|---:|---:|---:|")
    for model, how in PUBLISHED:
        one = reproduced(model, how)
        assert one.parameters == PARAMETERS[model]
        said = "out of memory" if one.published is None else f"{one.published:g}"
        off = f"{one.off:+.1%}" if one.off is not None else f"{one.planned > MEMORY / GB}"
        print(f"| {model} | {how} | {said} | {one.planned:.1f} | {off} |", flush=True)
        if how == OFFLOADED:
            alone, offloaded = CPU[model]
            host = one.host + alone
            print(
                f"| {model} | the same, CPU | {offloaded:g} | {host:.1f} | "
                f"{host / offloaded - 1:+.1%} |",
                flush=True,
            )
