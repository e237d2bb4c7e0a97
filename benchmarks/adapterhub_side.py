"""AdapterHub's side of `benchmarks.adapterhub`: run by a Python that has `adapters`, not graftune.

python adapterhub_side.py FOLDER    writes FOLDER/base and FOLDER/task, then answers each line
                                    "base", "adapter" or "step" with the least CPU seconds of a call
"""

import copy
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import adapters  # pyright: ignore[reportMissingImports]
import torch
from transformers import BertConfig, BertForSequenceClassification

TURNS = 5
LEAST = 8


def main(folder: str) -> None:
    """Answers until its input ends."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
    )
    config.num_labels = 15
    model: Any = BertForSequenceClassification(config).eval()
    model.save_pretrained(f"{folder}/base")
    plain = copy.deepcopy(model)
    adapters.init(model)
    model.add_adapter("task", config="seq_bn")
    model.train_adapter("task")
    model.set_active_adapters("task")
    model.save_adapter(f"{folder}/task", "task", use_safetensors=True)
    torch.manual_seed(1)
    batch = {
        "input_ids": torch.randint(1000, 20000, (16, 32)),
        "attention_mask": torch.ones(16, 32, dtype=torch.long),
        "labels": torch.randint(0, 15, (16,)),
    }
    model.classifier.requires_grad_(False)
    model.eval()  # train_adapter turns dropout on
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    few = {"input_ids": batch["input_ids"][:1, :16]}

    def forward(which: Any) -> None:
        with torch.no_grad():
            which(**few)

    def step() -> None:
        model.train()
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.eval()

    with torch.no_grad():
        first = model(**few).logits.flatten().tolist()
    print(sum(p.numel() for p in trained), *first, flush=True)
    for line in sys.stdin:
        what = line.strip()
        call: Callable[[], None] = partial(forward, plain if what == "base" else model)
        call, turns = (step, 1) if what == "step" else (call, TURNS)
        call()
        print(min(seconds(call, turns) for _ in range(LEAST)), flush=True)


def seconds(call: Callable[[], None], turns: int) -> float:
    """Returns CPU seconds of one call."""
    began = time.process_time()
    for _ in range(turns):
        call()
    return (time.process_time() - began) / turns


if __name__ == "__main__":
    main(sys.argv[1])
