"""An adapter carried from HF PEFT to us or back, and the two libraries' logits compared."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graftune as gt
from graftune.methods.base import Method
from tests.families import FAMILIES

peft = pytest.importorskip("peft", reason="parity is judged against HF PEFT itself")

TOLERANCE = 1e-6
Case = tuple[str, str, dict[str, Any]]
LINEARS = {
    "bert": ["query", "value", "dense"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "t5": ["q", "v", "wi", "wo"],
    "vit": ["q_proj", "v_proj", "fc1"],
}
"""What of a family PEFT is told to change."""


def ids(cases: list[Case]) -> list[str]:
    """Returns what cases are called."""
    return [f"{family}-{name}" for family, name, _ in cases]


def randomised(module: nn.Module, names: set[str] | None = None) -> None:
    """Moves every trained tensor, so that nothing is zero or as in the base."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, tensor in module.named_parameters():
            if tensor.requires_grad and (names is None or name in names):
                tensor.add_(torch.randn_like(tensor) * 0.1)


def logits(model: nn.Module, family: str, task: str) -> Tensor:
    inputs = FAMILIES[family].inputs(task=task)  # type: ignore[arg-type]
    return answer(model, inputs)


def answer(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """Returns a model's logits; those of PEFT's virtual tokens, which come first, left out."""
    with torch.no_grad():
        found = model.eval()(**inputs).logits
    real = inputs.get("decoder_input_ids", inputs.get("input_ids"))
    return found[:, -real.shape[1] :] if real is not None and found.ndim == 3 else found


def base(family: str, task: str) -> Any:
    return FAMILIES[family].build(task=task)  # type: ignore[arg-type]


def check_close(ours: Tensor, theirs: Tensor, plain: Tensor) -> None:
    assert (ours - plain).abs().max() > 1e-3, "the adapter changes nothing: the test is void"
    scale = max(1.0, float(theirs.abs().max()))
    assert (ours - theirs).abs().max() <= TOLERANCE * scale


def saved_by_peft(family: str, task: str, config: Any, path: Path) -> Tensor:
    """Writes an adapter of PEFT's that is off its start, and returns its logits."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(base(family, task), config)
        randomised(wrapped)
        wrapped.save_pretrained(path)
    return logits(_runnable(wrapped), family, task)


def check_from_peft(family: str, task: str, config: Any, path: Path) -> gt.Adapter:
    """Checks that we load what PEFT writes for a config, and that off it is the base."""
    theirs, model = saved_by_peft(family, task, config, path), base(family, task)
    plain = logits(model, family, task)
    adapter = gt.load(model, path)
    check_close(logits(model, family, task), theirs, plain)
    gt.activate(model, None)
    assert torch.equal(logits(model, family, task), plain)
    gt.activate(model, adapter.name)
    return adapter


def check_to_peft(family: str, task: str, method: Method, path: Path) -> gt.Adapter:
    """Checks that PEFT loads what we write, and that we do, bit for bit."""
    model = base(family, task)
    plain = logits(model, family, task)
    adapter = gt.attach(model, method)
    randomised(model)
    adapter.save(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message="Found missing adapter keys")
        warnings.filterwarnings("error", message=".*did not match any targeted module.*")
        wrapped = peft.PeftModel.from_pretrained(base(family, task), path)
    theirs = logits(_runnable(wrapped), family, task)
    check_close(logits(model, family, task), theirs, plain)
    check_again(adapter, family, task, path)
    loads = gt.inspect(path).verdicts[0]
    assert loads.reader == "peft"
    assert loads.loads
    return adapter


def check_own_form(family: str, method: Method, path: Path, task: str = "default") -> gt.Adapter:
    """Checks that what PEFT can't compute is written so that PEFT doesn't take it, and we do."""
    model = base(family, task)
    adapter = gt.attach(model, method)
    randomised(model)
    adapter.save(path)
    check_again(adapter, family, task, path)
    assert not gt.inspect(path).verdicts[0].loads
    return adapter


def check_again(adapter: gt.Adapter, family: str, task: str, path: Path) -> None:
    """Checks that a saved adapter loads as it is, bit for bit, settings too."""
    again = base(family, task)
    loaded = gt.load(again, path, name="again")
    assert loaded.method == adapter.method
    assert loaded.state_dict().keys() == adapter.state_dict().keys()
    assert loaded.count() == adapter.count()
    assert torch.equal(logits(again, family, task), logits(adapter.model, family, task))


def _runnable(wrapped: nn.Module) -> nn.Module:
    """Gives PEFT's wrappers of convolutions the stride that Whisper reads there."""
    for module in wrapped.modules():
        inner = getattr(module, "base_layer", None)
        if isinstance(inner, nn.Conv1d | nn.Conv2d):
            module.__dict__["stride"] = inner.stride
    return wrapped
