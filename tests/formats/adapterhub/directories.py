"""AdapterHub's directories, written by hand: its settings, and random tensors under its names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

WIDTH, BLOCKS = 32, 2
TYPES = {"bert": "bert", "gpt2": "gpt2", "llama": "llama", "t5": "t5", "vit": "vit"}

# Modules that a bottleneck hangs on, by what it follows.
_PLAIN = {"attention": "attention_adapters", "ffn": "output_adapters"}
_HOMES: dict[str, dict[str, dict[str, str]]] = {
    "bert": {"bert.encoder.layer": {"attention": "attention.output", "ffn": "output"}},
    "gpt2": {"transformer.h": _PLAIN},
    "llama": {"model.layers": _PLAIN},
    "t5": {
        "encoder.block": {"attention": "layer.0", "ffn": "layer.1"},
        "decoder.block": {"attention": "layer.0", "ffn": "layer.2"},
    },
    "vit": {
        "vit.encoder.layer": {"attention": "attention_adapters", "ffn": "output.output_adapters"}
    },
}

BOTTLENECK: dict[str, Any] = {
    "adapter_residual_before_ln": False,
    "cross_adapter": False,
    "dropout": 0.0,
    "init_weights": "bert",
    "init_weights_seed": None,
    "inv_adapter": None,
    "inv_adapter_reduction_factor": None,
    "is_parallel": False,
    "leave_out": [],
    "ln_after": False,
    "ln_before": False,
    "mh_adapter": False,
    "non_linearity": "relu",
    "original_ln_after": True,
    "original_ln_before": True,
    "output_adapter": True,
    "phm_layer": False,
    "reduction_factor": 4,
    "residual_before_ln": True,
    "scaling": 1.0,
    "stochastic_depth": 0.0,
    "use_gating": False,
}
FORMS: dict[str, dict[str, Any]] = {
    "seq_bn": {},
    "double_seq_bn": {
        "mh_adapter": True,
        "non_linearity": "swish",
        "original_ln_before": False,
    },
    "par_bn": {"is_parallel": True, "original_ln_before": False, "scaling": 4.0},
}
LORA: dict[str, Any] = {
    "alpha": 6,
    "architecture": "lora",
    "attn_matrices": ["q", "v"],
    "composition_mode": "add",
    "dropout": 0.0,
    "intermediate_lora": False,
    "leave_out": [],
    "output_lora": False,
    "r": 3,
    "selfattn_lora": True,
    "use_dora": False,
    "use_gating": False,
    "vera_b": None,
    "vera_d": None,
}
IA3 = LORA | {
    "alpha": 1,
    "attn_matrices": ["k", "v"],
    "composition_mode": "scale",
    "intermediate_lora": True,
    "r": 1,
}


def places(family: str, kinds: tuple[str, ...]) -> dict[tuple[int, str], str]:
    """Returns what bottlenecks hang on, by the block (counted over all stacks) and the kind."""
    found: dict[tuple[int, str], str] = {}
    for stack, (path, homes) in enumerate(_HOMES[family].items()):
        for at in range(BLOCKS):
            for kind in kinds:
                found[stack * BLOCKS + at, kind] = f"{path}.{at}.{homes[kind]}"
    return found


def bottlenecks(
    family: str, config: Mapping[str, Any], name: str = "task", k: int = WIDTH // 4
) -> dict[str, Tensor]:
    """Returns random tensors of a bottleneck adapter."""
    draw = torch.Generator().manual_seed(5)
    kinds = tuple(
        kind
        for kind, flag in (("attention", "mh_adapter"), ("ffn", "output_adapter"))
        if config[flag]
    )
    shapes = {
        "adapter_down.0.weight": (k, WIDTH),
        "adapter_down.0.bias": (k,),
        "adapter_up.weight": (WIDTH, k),
        "adapter_up.bias": (WIDTH,),
    }
    return {
        f"{home}.adapters.{name}.{tensor}": torch.randn(shape, generator=draw) * 0.3
        for home in places(family, kinds).values()
        for tensor, shape in shapes.items()
    }


def write(
    folder: Path,
    settings: Any,
    tensors: Mapping[str, Tensor],
    family: str,
    **more: Any,
) -> Path:
    """Writes an adapter's directory, as the library does with use_safetensors=True."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "config": settings,
        "hidden_size": WIDTH,
        "model_class": "SomeModel",
        "model_name": "some/base",
        "model_type": TYPES[family],
        "name": "task",
        "version": "adapters.1.3.0",
    }
    text = json.dumps({**config, **more}, indent=2, sort_keys=True)
    (folder / "adapter_config.json").write_text(text)
    safetensors.torch.save_file(dict(tensors), folder / "adapter.safetensors")
    return folder


def write_head(folder: Path, config: Any, tensors: Mapping[str, Tensor]) -> None:
    """Writes a head beside an adapter."""
    (folder / "head_config.json").write_text(json.dumps({"config": config, "name": "task"}))
    safetensors.torch.save_file(dict(tensors), folder / "model_head.safetensors")
