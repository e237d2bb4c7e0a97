"""What an unmerged LoRA adds to a linear's call at batch 1, the linear itself taken off."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from benchmarks.measure import ROUNDS, Row, row, take_turns
from benchmarks.models import minilm, with_ours, with_peft

CALLS = 2000


def run(rounds: int = ROUNDS) -> list[Row]:
    base = minilm().eval()
    ours, peer = with_ours(base).eval(), with_peft(base, "SEQ_CLS").eval()
    found: list[Row] = []
    for tokens in (1, 16):
        x = torch.randn(1, tokens, base.config.hidden_size)
        sides = {
            "plain": _call(base, x),
            "ours": _call(ours, x),
            "peft": _call(peer.base_model.model, x),
        }
        times = take_turns(sides, max(rounds, 9), repeat=CALLS)
        ratios = [(t["ours"] - t["plain"]) / (t["peft"] - t["plain"]) for t in times]
        note = f"adds {_added(times, 'ours'):.1f} µs, PEFT {_added(times, 'peft'):.1f} µs"
        found.append(row(f"lora_call, {tokens} token{'s'[: tokens > 1]}", ratios, 0.6, note=note))
    return found


def _call(model: Any, x: torch.Tensor) -> Any:
    linear = model.bert.encoder.layer[0].attention.self.query

    @torch.no_grad()
    def call() -> None:
        linear(x)

    return call


def _added(times: list[dict[str, float]], side: str) -> float:
    return 1e6 * statistics.median(t[side] - t["plain"] for t in times)
