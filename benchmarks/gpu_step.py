"""LoRA and QLoRA on a GPU against HF PEFT: time of a step and peak memory, side by side.

python -m benchmarks.gpu_step                  on a CUDA device, LLaMA of 1.2 B parameters
python -m benchmarks.gpu_step --tiny           the same lines on a CPU, to try the script

Weights are random, in bfloat16; QLoRA has them in NF4 with double quantisation (bitsandbytes). Both
libraries train the same linears with r = 16, each with its defaults. Rounds take turns. The peak is
what torch has allocated at most in a step, above all that was loaded; the other side's model lies
beside it and isn't in it.
"""

from __future__ import annotations

import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch

import graftune as gt

ROUNDS, STEPS, RANK = 7, 5, 16
TINY = "--tiny" in sys.argv
DEVICE = "cpu" if TINY else "cuda"
ROWS, TOKENS = (2, 16) if TINY else (4, 512)
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def config() -> Any:
    """Returns the shape of Llama 3.2 1B, or a small one."""
    import transformers as hf

    sizes: dict[str, Any] = {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    }
    if TINY:
        sizes |= {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 500}
    return hf.LlamaConfig(**sizes)


def loaded(folder: str, *, packed: bool) -> Any:
    """Returns the base from its folder, 4-bit if `packed`."""
    import transformers as hf

    options: dict[str, Any] = {"dtype": torch.bfloat16, "device_map": {"": DEVICE}}
    if packed:
        options["quantization_config"] = hf.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    return hf.LlamaForCausalLM.from_pretrained(folder, **options)


def ours(model: Any, targets: list[str]) -> Any:
    """Returns the model with our LoRA."""
    gt.attach(model, gt.LoRA(r=RANK, alpha=RANK, targets=targets), seed=0)
    return model


def theirs(model: Any, targets: list[str]) -> Any:
    """Returns the model in HF PEFT's wrapper."""
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(
        task_type="CAUSAL_LM", r=RANK, lora_alpha=RANK, target_modules=targets, lora_dropout=0.0
    )
    return get_peft_model(model, settings)


def job(model: Any, *, checkpointing: bool) -> Callable[[], float]:
    """Returns a call that takes a few steps and returns the last loss."""
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=not TINY)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (ROWS, TOKENS), generator=draw).to(DEVICE)

    def steps() -> float:
        loss = torch.zeros(())
        for _ in range(STEPS):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return float(loss)

    return steps


def measured(call: Callable[[], float]) -> tuple[float, float, float]:
    """Returns milliseconds per step, MiB above what was loaded, and the last loss."""
    if TINY:
        began = time.perf_counter()
        loss = call()
        return (time.perf_counter() - began) / STEPS * 1e3, 1.0, loss
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, began = torch.cuda.memory_allocated(), time.perf_counter()
    loss = call()
    torch.cuda.synchronize()
    spent = (time.perf_counter() - began) / STEPS * 1e3
    return spent, (torch.cuda.max_memory_allocated() - before) / 2**20, loss


def compare(
    name: str, folder: str, targets: list[str], *, packed: bool, checkpointing: bool
) -> None:
    """Prints one line: both sides and their ratios."""
    sides: dict[str, Callable[[], float]] = {}
    for side, wrap in (("ours", ours), ("peft", theirs)):
        model = wrap(loaded(folder, packed=packed), targets)
        sides[side] = job(model, checkpointing=checkpointing)
        kinds = {str(p.dtype) for p in model.parameters() if p.requires_grad}
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        print(f"  {side}: trains {count:,} in {', '.join(kinds)}", flush=True)
    for call in sides.values():
        call()
    found: dict[str, list[tuple[float, float, float]]] = {side: [] for side in sides}
    for number in range(ROUNDS):
        for side in list(sides)[:: 1 if number % 2 else -1]:
            found[side].append(measured(sides[side]))
    a, b = found["ours"], found["peft"]
    ratios = sorted(x[0] / y[0] for x, y in zip(a, b, strict=True))
    print(
        f"| {name} | {statistics.median(x[0] for x in a):.1f} | "
        f"{statistics.median(x[0] for x in b):.1f} | {statistics.median(ratios):.2f} "
        f"[{ratios[0]:.2f} … {ratios[-1]:.2f}] | {a[-1][1]:,.0f} | {b[-1][1]:,.0f} | "
        f"{a[-1][1] / b[-1][1]:.2f} | {a[-1][2]:.3f} / {b[-1][2]:.3f} |",
        flush=True,
    )
    sides.clear()
    gc.collect()
    if not TINY:
        torch.cuda.empty_cache()


def main() -> None:
    """Prints the table."""
    import peft
    import transformers as hf

    device = "CPU" if TINY else torch.cuda.get_device_name()
    versions = f"torch {torch.__version__}, transformers {hf.__version__}, peft {peft.__version__}"
    print(f"{device}, {versions}; {ROWS} × {TOKENS} tokens, r = {RANK}")
    print("| | ours, ms | PEFT, ms | ratio | ours, MiB | PEFT, MiB | ratio | losses |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        with torch.device(DEVICE):
            hf.LlamaForCausalLM(config()).to(torch.bfloat16).save_pretrained(folder)
        some, plain = ["q_proj", "v_proj"], {"packed": False, "checkpointing": False}
        compare("LoRA, q and v", folder, some, **plain)
        compare("LoRA, all linears", folder, LINEARS, **plain)
        compare("LoRA, all, checkpointing", folder, LINEARS, packed=False, checkpointing=True)
        compare("QLoRA, all linears", folder, LINEARS, packed=True, checkpointing=False)
        compare("QLoRA, all, checkpointing", folder, LINEARS, packed=True, checkpointing=True)


if __name__ == "__main__":
    main()
