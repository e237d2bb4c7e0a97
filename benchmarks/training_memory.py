"""What a training step keeps, and how far the process rises, for methods of every kind.

python -m benchmarks.training_memory          the tables of docs/training-memory.md
python -m benchmarks training_memory          Ladder Side-Tuning against HF PEFT's LoRA, as ratios

Each process peak is of a fresh process: one step to warm up, then the rise of its resident memory
over the loaded model in the steps after it (/proc, Linux alone).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.backward_cut import kept_bytes
from benchmarks.measure import ROUNDS, Row, fresh_process, row

MIB = 2**20
SHAPES = ("bert", "t5")
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "full fine-tuning": ("FullFineTuning", {}),
    "BitFit": ("BitFit", {"add_missing": True}),
    "LoRA": ("LoRA", {"r": 8, "targets": "qv"}),
    "Houlsby adapters": ("HoulsbyAdapter", {}),
    "prompt tuning": ("PromptTuning", {"length": 20}),
    "Ladder Side-Tuning": ("LadderSideTuning", {}),
}
PEFT = "LoRA of HF PEFT"


def base(shape: str) -> tuple[nn.Module, dict[str, Any]]:
    """Returns a model of random weights and a batch."""
    import transformers as hf

    torch.manual_seed(0)
    if shape == "bert":
        config = hf.BertConfig(
            hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=12
        )
        ids = torch.randint(5, 1000, (32, 64))
        return hf.BertForSequenceClassification(config), {
            "input_ids": ids,
            "labels": torch.zeros(32, dtype=torch.long),
        }
    config = hf.T5Config(
        d_model=512,
        d_ff=2048,
        num_layers=6,
        num_heads=8,
        vocab_size=8000,
        pad_token_id=0,
    )
    config.decoder_start_token_id = 0
    return hf.T5ForConditionalGeneration(config), {
        "input_ids": torch.randint(5, 1000, (16, 64)),
        "labels": torch.randint(5, 1000, (16, 16)),
    }


def trained(name: str, shape: str) -> tuple[nn.Module, dict[str, Any]]:
    """Returns a model in training mode with a method on it, and a batch."""
    model, batch = base(shape)
    if name == PEFT:
        from peft import LoraConfig, get_peft_model

        targets = ["query", "value"] if shape == "bert" else ["q", "v"]
        task = "SEQ_CLS" if shape == "bert" else "SEQ_2_SEQ_LM"
        config = LoraConfig(r=8, target_modules=targets, task_type=task)
        return get_peft_model(model, config).train(), batch  # type: ignore[arg-type]
    import graftune as gt

    kind, settings = METHODS[name]
    gt.attach(model, getattr(gt, kind)(**settings), seed=0)
    return model.train(), batch


def peak_rise(name: str, shape: str) -> float:
    """Returns how far a fresh process rises over its loaded model in training, MiB."""
    _, said = fresh_process("-m", "benchmarks.training_memory", name, shape)
    return float(said.strip().splitlines()[-1])


def _rise(name: str, shape: str) -> float:
    """Measures it, in the process that is called for it."""
    model, batch = trained(name, shape)
    step(model, {key: value[:1] for key, value in batch.items()})
    Path("/proc/self/clear_refs").write_text("5")
    floor = _status("VmRSS")
    for _ in range(2):
        step(model, batch)
    return (_status("VmHWM") - floor) / 1024


def step(model: nn.Module, batch: Mapping[str, Any]) -> None:
    """Takes one step's forward and backward passes, gradients freed after."""
    model(**batch).loss.backward()
    model.zero_grad(set_to_none=True)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def run(rounds: int = ROUNDS) -> list[Row]:
    found: list[Row] = []
    for shape in SHAPES:
        ours, theirs = (
            kept_bytes(*trained(name, shape)) / MIB for name in ("Ladder Side-Tuning", PEFT)
        )
        note = f"Ladder Side-Tuning {ours:.0f} MiB, LoRA of HF PEFT {theirs:.0f} MiB"
        found.append(row(f"training_memory, {shape}, kept", [ours / theirs], 0.35, note=note))
        pairs = [
            (peak_rise("Ladder Side-Tuning", shape), peak_rise(PEFT, shape)) for _ in range(rounds)
        ]
        ours, theirs = pairs[0]
        note = f"peak of the process: {ours:.0f} MiB, LoRA of HF PEFT {theirs:.0f} MiB"
        ratios = [mine / other for mine, other in pairs]
        found.append(row(f"training_memory, {shape}, peak", ratios, 0.35, note=note))
    return found


def main() -> None:
    """Prints a table for each shape."""
    for shape in SHAPES:
        print(f"\n| {shape} | trained | kept, MiB | peak rise, MiB |\n|---|---:|---:|---:|")
        for name in (*METHODS, PEFT):
            model, batch = trained(name, shape)
            count = sum(p.numel() for p in model.parameters() if p.requires_grad)
            kept, rise = kept_bytes(model, batch) / MIB, peak_rise(name, shape)
            bar = "█" * round(rise / 25)
            print(f"| {name} | {count:,} | {kept:.0f} | {rise:.0f} {bar} |", flush=True)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(_rise(*sys.argv[1:]))
    else:
        main()
