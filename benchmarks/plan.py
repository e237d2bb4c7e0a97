"""Planned memory beside what training takes in earnest, and beside published figures.

python -m benchmarks plan                     how far plans are off, as a ratio
python -m benchmarks.plan                     the table of docs/how-to/plan.md
python -m benchmarks.plan --device cuda       the same on a GPU (torch.cuda.max_memory_allocated)
python -m benchmarks.plan --published         the rows of HF PEFT's README

Every measurement is of a fresh process that trains three steps of random weights: on the CPU how
far it rises over its loaded model, its allocator told to hand back what is freed.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Iterator
from typing import Any

import graftune as gt
from benchmarks.measure import ROUNDS, Row, row
from graftune.methods.base import Method
from graftune.planning.measuring import measure
from graftune.planning.planned import Plan
from graftune.planning.skeletons import base_of

MIB = 2**20
UNIT = "× measured"
BERT = {
    "model_type": "bert",
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 8000,
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 8000,
    "n_embd": 512,
    "n_layer": 6,
    "n_head": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
T5 = {
    "model_type": "t5",
    "d_model": 512,
    "d_ff": 2048,
    "num_layers": 6,
    "num_heads": 8,
    "vocab_size": 8000,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
}
VIT = {
    "model_type": "vit",
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
}
CHECKPOINTED = {"gradient_checkpointing": True}
HALF = {"precision": "bfloat16"}
CASES: tuple[tuple[str, dict[str, Any], Method, dict[str, Any]], ...] = (
    ("BERT", BERT, gt.LoRA(r=8, targets="qv"), {"batch_size": 16}),
    ("BERT", BERT, gt.HoulsbyAdapter(), {"batch_size": 16}),
    ("BERT", BERT, gt.PromptTuning(length=20), {"batch_size": 16}),
    ("BERT", BERT, gt.BitFit(), {"batch_size": 16}),
    ("BERT", BERT, gt.FullFineTuning(), {}),
    ("BERT", BERT, gt.LadderSideTuning(), {"batch_size": 64}),
    ("BERT", BERT, gt.LoRA(), {"batch_size": 32, **CHECKPOINTED}),
    ("BERT", BERT, gt.LoRA(), {"batch_size": 16, **HALF}),
    ("BERT", BERT, gt.FullFineTuning(), {"optimizer": "adafactor"}),
    ("Llama", LLAMA, gt.LoRA(), {}),
    ("Llama", LLAMA, gt.HoulsbyAdapter(), HALF),
    ("Llama", LLAMA, gt.LoRA(), {"batch_size": 16, **CHECKPOINTED, **HALF}),
    ("Llama", LLAMA, gt.LadderSideTuning(), {"batch_size": 16}),
    ("Llama", LLAMA, gt.FullFineTuning(), {"optimizer": "sgd"}),
    ("GPT-2", GPT2, gt.LoRA(), {}),
    ("GPT-2", GPT2, gt.PrefixTuning(length=10), {"accumulation": 2}),
    ("GPT-2", GPT2, gt.FullFineTuning(), {"optimizer": "adamw_torch"}),
    ("T5", T5, gt.LoRA(r=8, targets="qv"), {}),
    ("T5", T5, gt.FullFineTuning(), {}),
    ("T5", T5, gt.LadderSideTuning(), {"batch_size": 16}),
    ("T5", T5, gt.PromptTuning(length=20), HALF),
    ("ViT", VIT, gt.LoRA(r=8, targets="qv"), {"batch_size": 16}),
    ("ViT", VIT, gt.HoulsbyAdapter(), {"batch_size": 16, **CHECKPOINTED}),
    ("ViT", VIT, gt.BitFit(), {"batch_size": 16, **HALF}),
)
"""Family, configuration, method and settings; 128 tokens, answers of 32, batches of 8 if unsaid."""


@dataclasses.dataclass(frozen=True)
class Compared:
    """One line of the table."""

    family: str
    method: str
    settings: str
    plan: Plan
    measured: int
    seconds: float

    @property
    def off(self) -> float:
        """How far the plan is off, as a share of what was measured."""
        return self.plan.rise_bytes / self.measured - 1


def compared(device: str = "cpu") -> Iterator[Compared]:
    """Yields a line for each case."""
    for family, config, method, settings in CASES:
        given = {"batch_size": 8, "length": 128, "target_length": 32} | settings
        plan = gt.plan(config, method, device=device, timed=True, **given)
        found = measure(plan, base_of(config, None, plan.settings.labels).config)
        said = ", ".join(f"{key}={value}" for key, value in settings.items()) or "as it is"
        yield Compared(family, method.name, said, plan, found.rise_bytes, found.seconds_per_step)


def run(rounds: int = ROUNDS) -> list[Row]:
    """Returns how far plans are off: the median and the worst."""
    off = [abs(one.off) for one in compared()]
    return [
        row("plan, median", [1 + statistics.median(off)], 1.10, unit=UNIT, note=f"{len(off)} runs"),
        row("plan, worst", [1 + max(off)], 1.20, unit=UNIT, note="1 + the share it is off by"),
    ]


def main() -> None:
    """Prints the table that was asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--published", action="store_true")
    options = parser.parse_args()
    if options.published:
        from benchmarks.plan_published import show

        show()
        return
    print("| model | method | settings | planned, MiB | measured, MiB | off |")
    print("|---|---|---|---:|---:|---:|")
    off: list[float] = []
    for one in compared(options.device):
        off.append(abs(one.off))
        print(
            f"| {one.family} | {one.method} | {one.settings} | {one.plan.rise_bytes / MIB:.0f} | "
            f"{one.measured / MIB:.0f} | {one.off:+.1%} |",
            flush=True,
        )
    print(f"\nmedian {statistics.median(off):.1%}, worst {max(off):.1%}")


if __name__ == "__main__":
    main()
