"""An adapter carried from HF PEFT to us or back, and the two libraries' logits compared."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

import graftune as gt
from graftune.methods.base import Method
from tests.parity.test_peft_lora import base, check_close, logits, peft, randomised


def check_from_peft(family: str, task: str, config: Any, path: Path) -> gt.Adapter:
    """Checks that we load what PEFT writes for a config, and that off it is the base."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(base(family, task), config)
        randomised(wrapped)
        wrapped.save_pretrained(path)
    theirs, model = logits(_runnable(wrapped), family, task), base(family, task)
    plain = logits(model, family, task)
    adapter = gt.load(model, path)
    check_close(logits(model, family, task), theirs, plain)
    gt.activate(model, None)
    assert torch.equal(logits(model, family, task), plain)
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
    assert gt.inspect(path).verdicts[0].loads
    return adapter


def check_own_form(family: str, method: Method, path: Path) -> gt.Adapter:
    """Checks that what PEFT can't compute is written so that PEFT doesn't take it, and we do."""
    model = base(family, "default")
    adapter = gt.attach(model, method)
    randomised(model)
    adapter.save(path)
    check_again(adapter, family, "default", path)
    assert not gt.inspect(path).verdicts[0].loads
    return adapter


def check_again(adapter: gt.Adapter, family: str, task: str, path: Path) -> None:
    """Checks that a saved adapter loads as it is, bit for bit, settings too."""
    again = base(family, task)
    loaded = gt.load(again, path, name="again")
    assert loaded.method == adapter.method
    assert torch.equal(logits(again, family, task), logits(adapter.model, family, task))


def _runnable(wrapped: nn.Module) -> nn.Module:
    """Gives PEFT's wrappers of convolutions the stride that Whisper reads there."""
    for module in wrapped.modules():
        inner = getattr(module, "base_layer", None)
        if isinstance(inner, nn.Conv1d | nn.Conv2d):
            module.__dict__["stride"] = inner.stride
    return wrapped
