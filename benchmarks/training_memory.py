"""What a training step keeps and takes, and how far the process rises, for methods of every kind.

python -m benchmarks.training_memory          the tables of docs/training-memory.md
python -m benchmarks training_memory          Ladder Side-Tuning against HF PEFT's LoRA, as ratios

Each process peak is of a fresh process: one step to warm up, then the rise of its resident memory
over the loaded model in the steps after it (/proc, Linux alone). A step's time is the process's
own on one thread, the median of several.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.backward_cut import Kept, kept_bytes
from benchmarks.measure import ROUNDS, Row, fresh_process, row

MIB = 2**20
STEPS = 7
SHAPES = ("bert", "t5")
LM = "llama"
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "full fine-tuning": ("FullFineTuning", {}),
    "BitFit": ("BitFit", {"add_missing": True}),
    "LoRA": ("LoRA", {"r": 8, "targets": "qv"}),
    "Houlsby adapters": ("HoulsbyAdapter", {}),
    "prompt tuning": ("PromptTuning", {"length": 20}),
    "Ladder Side-Tuning": ("LadderSideTuning", {}),
}
LADDER = "Ladder Side-Tuning"
CACHED = "Ladder Side-Tuning, trunk cache"
PEFT = "LoRA of HF PEFT"
PIECES = ", loss in pieces"
CHUNK = 128
"""Tokens of which logits are computed at once, where the loss is in pieces."""
FILL = "fill"
"""Said before a folder to a process that fills a trunk cache there."""


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
    if shape == LM:
        config = hf.LlamaConfig(
            hidden_size=384,
            intermediate_size=1024,
            num_hidden_layers=6,
            num_attention_heads=6,
            num_key_value_heads=2,
            vocab_size=32000,
        )
        ids = torch.randint(5, 1000, (8, 128))
        return hf.LlamaForCausalLM(config), {"input_ids": ids, "labels": ids}
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
    name = name.removesuffix(PIECES)
    if name == PEFT:
        from peft import LoraConfig, get_peft_model

        targets, task = {
            "bert": (["query", "value"], "SEQ_CLS"),
            "t5": (["q", "v"], "SEQ_2_SEQ_LM"),
            LM: (["q_proj", "v_proj"], "CAUSAL_LM"),
        }[shape]
        config = LoraConfig(r=8, target_modules=targets, task_type=task)
        return get_peft_model(model, config).train(), batch  # type: ignore[arg-type]
    import graftune as gt

    kind, settings = METHODS[LADDER if name == CACHED else name]
    gt.attach(model, getattr(gt, kind)(**settings), seed=0)
    return model.train(), batch


@contextlib.contextmanager
def in_pieces(model: nn.Module, name: str) -> Iterator[None]:
    """Lets the loss be computed in pieces where the name says so."""
    if not name.endswith(PIECES):
        yield
        return
    import graftune as gt

    with gt.chunked_loss(model, CHUNK):
        yield


@contextlib.contextmanager
def filled(shape: str) -> Iterator[str]:
    """Yields a folder that another process has filled with what the trunk makes of the batch."""
    with tempfile.TemporaryDirectory() as folder:
        fresh_process("-m", "benchmarks.training_memory", FILL + folder, shape)
        yield folder


def fill(folder: str, shape: str) -> None:
    """Fills it."""
    import graftune as gt

    model, batch = trained(CACHED, shape)
    with gt.TrunkCache(model, folder).passing(batch):
        model(**batch)


def kept(name: str, shape: str) -> float:
    """Returns what a training step keeps for its backward pass, MiB."""
    model, batch = trained(name, shape)
    with in_pieces(model, name):
        return _kept(name, shape, model, batch)


def _kept(name: str, shape: str, model: nn.Module, batch: dict[str, Any]) -> float:
    if name.removesuffix(PIECES) != CACHED:
        return kept_bytes(model, batch) / MIB
    import graftune as gt
    from graftune.training.trunk_cache import Reader

    seen, let_go = Kept(), Reader.let_go
    with filled(shape) as folder:
        cache = gt.TrunkCache(model, folder)
        with cache.passing({k: v[:1] for k, v in batch.items()}):
            model(**{k: v[:1] for k, v in batch.items()})
        Reader.let_go = lambda self, saved: seen.note(let_go(self, saved))
        try:
            with cache.passing(batch):
                model(**batch)
        finally:
            Reader.let_go = let_go
    assert cache.hits == len(batch["labels"])
    return seen.bytes(model) / MIB


def peak_rise(name: str, shape: str) -> float:
    """Returns how far a fresh process rises over its loaded model in training, MiB."""
    return peak_and_time(name, shape)[0]


def peak_and_time(name: str, shape: str) -> tuple[float, float]:
    """Returns the rise of a fresh process, MiB, and the milliseconds of a step."""
    _, said = fresh_process("-m", "benchmarks.training_memory", name, shape)
    rise, took = said.strip().splitlines()[-1].split()
    return float(rise), float(took)


def _measured(name: str, shape: str) -> str:
    """Measures both, in the process that is called for it."""
    import graftune as gt

    model, batch = trained(name, shape)
    is_cached = name.removesuffix(PIECES) == CACHED
    folders = filled(shape) if is_cached else contextlib.nullcontext()
    with in_pieces(model, name), folders as folder:
        passing = contextlib.nullcontext if folder is None else gt.TrunkCache(model, folder).passing
        step(model, {key: value[:1] for key, value in batch.items()}, passing)
        Path("/proc/self/clear_refs").write_text("5")
        floor = _status("VmRSS")
        for _ in range(2):
            step(model, batch, passing)
        rise = (_status("VmHWM") - floor) / 1024
        times: list[float] = []
        for _ in range(STEPS):
            began = time.process_time()
            step(model, batch, passing)
            times.append(1000 * (time.process_time() - began))
    return f"{rise} {statistics.median(times)}"


def step(model: nn.Module, batch: Mapping[str, Any], passing: Any) -> None:
    """Takes one step's forward and backward passes, gradients freed after."""
    with passing(batch):
        loss = model(**batch).loss
    loss.backward()
    model.zero_grad(set_to_none=True)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def run(rounds: int = ROUNDS) -> list[Row]:
    found: list[Row] = []
    for shape in SHAPES:
        theirs = kept(PEFT, shape), [peak_rise(PEFT, shape) for _ in range(rounds)]
        for name, most in ((LADDER, 0.35), (CACHED, 0.15)):
            found += _against(theirs, name, shape, most)
    return found


def _against(
    theirs: tuple[float, list[float]], name: str, shape: str, most: float
) -> Iterator[Row]:
    ours = kept(name, shape)
    note = f"{name} {ours:.0f} MiB, LoRA of HF PEFT {theirs[0]:.0f} MiB"
    yield row(f"training_memory, {shape}, kept", [ours / theirs[0]], most, note=note)
    rises = [peak_rise(name, shape) for _ in theirs[1]]
    note = f"peak of the process: {rises[0]:.0f} MiB, LoRA of HF PEFT {theirs[1][0]:.0f} MiB"
    ratios = [mine / other for mine, other in zip(rises, theirs[1], strict=True)]
    yield row(f"training_memory, {shape}, peak", ratios, most, note=note)


def main() -> None:
    """Prints a table for each shape."""
    for shape, names in (
        ("bert", (*METHODS, CACHED, PEFT)),
        ("t5", (*METHODS, CACHED, CACHED + PIECES, PEFT)),
        (LM, ("LoRA", "LoRA" + PIECES, LADDER, LADDER + PIECES, PEFT)),
    ):
        print(f"\n| {shape} | trained | kept, MiB | step, ms | peak rise, MiB |")
        print("|---|---:|---:|---:|---:|")
        for name in names:
            model, _ = trained(name, shape)
            count = sum(p.numel() for p in model.parameters() if p.requires_grad)
            rise, took = peak_and_time(name, shape)
            bar = "█" * round(rise / 25)
            told = f"{count:,} | {kept(name, shape):.0f} | {took:.0f} | {rise:.0f} {bar}"
            print(f"| {name} | {told} |", flush=True)


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1].startswith(FILL):
        fill(sys.argv[1].removeprefix(FILL), sys.argv[2])
    elif len(sys.argv) == 3:
        print(_measured(*sys.argv[1:]))
    else:
        main()
