"""Loading 100 adapters into one model, from directories that HF PEFT wrote."""

from __future__ import annotations

import copy
import shutil
import tempfile
from pathlib import Path
from typing import Any

import graftune as gt
from benchmarks.measure import ROUNDS, Row, cpu_seconds, row
from benchmarks.models import minilm, with_peft

COUNT = 100


def run(rounds: int = ROUNDS) -> list[Row]:
    base = minilm().eval()
    with tempfile.TemporaryDirectory() as folder:
        paths = _written(base, Path(folder))
        ratios: list[float] = []
        for number in range(rounds):
            times: dict[str, float] = {}
            for load in (_ours, _peft) if number % 2 else (_peft, _ours):
                model = copy.deepcopy(base)
                times[load.__name__] = cpu_seconds(lambda m=model, f=load: f(m, paths))
            ratios.append(times["_ours"] / times["_peft"])
    note = f"{COUNT} LoRA adapters of r=8 on all linears of MiniLM"
    return [row("load_100", ratios, 0.3, note=note)]


def _written(base: Any, folder: Path) -> list[Path]:
    first = folder / "a0"
    with_peft(base, "SEQ_CLS").save_pretrained(str(first))
    paths = [first, *(folder / f"a{number}" for number in range(1, COUNT))]
    for path in paths[1:]:
        shutil.copytree(first, path)
    return paths


def _ours(model: Any, paths: list[Path]) -> None:
    for path in paths:
        gt.load(model, path, name=path.name)


def _peft(model: Any, paths: list[Path]) -> None:
    from peft import PeftModel

    peer = PeftModel.from_pretrained(model, str(paths[0]), adapter_name=paths[0].name)
    for path in paths[1:]:
        peer.load_adapter(str(path), adapter_name=path.name)
