"""Weights of quantised linears as numbers, and numbers as weights of their kind.

    bitsandbytes, 4 bit   `Params4bit`: codes two a byte, scales in its `quant_state`
    bitsandbytes, int8    `Int8Params`: a code a byte, scales beside it or in the host's `state`
    torchao               a tensor of the linear's size that computes for itself

bitsandbytes is imported where one of its weights is met, which it then has made.
"""

from __future__ import annotations

import copy
import importlib
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from graftune.anatomy.packed import is_packed
from graftune.errors import AdapterError

Kind = Literal["4-bit", "int8", "torchao"]
_CLASSES: dict[str, Kind] = {"Params4bit": "4-bit", "Int8Params": "int8"}


def kind_of(host: nn.Module) -> Kind | None:
    """Returns what quantised a host's weight; None for plain numbers, and for codes unknown."""
    weight = host._parameters.get("weight")
    if weight is None or not is_packed(weight):
        return None
    if type(weight).__module__.startswith("torchao"):
        return "torchao"
    return _CLASSES.get(type(weight).__name__)


def numbers(host: nn.Module) -> Tensor:
    """Returns a quantised weight as the numbers that the host computes with, `(out, in)`.

    Raises:
        AdapterError: its quantiser is not known.
    """
    weight: Any = host._parameters["weight"]
    kind = kind_of(host)
    if kind == "torchao":
        return weight.dequantize()
    if kind is None or weight.is_meta:
        raise AdapterError(
            f"The weight of a {type(host).__name__} is quantised and can't be read as numbers "
            "here: load the base model in 16 or 32 bit for this."
        )
    bnb = _bitsandbytes().functional
    if kind == "int8":
        return bnb.int8_vectorwise_dequant(weight.data, _scales(host))
    return bnb.dequantize_4bit(*_as_quantised(weight.data, copy.copy(weight.quant_state)))


def packed(host: nn.Module, value: Tensor) -> nn.Parameter:
    """Returns numbers, `(out, in)`, quantised as the host's weight is.

    Raises:
        AdapterError: torchao's linears, and unknown ones, are not quantised again.
    """
    weight: Any = host._parameters["weight"]
    kind = kind_of(host)
    if kind not in ("4-bit", "int8"):
        raise AdapterError(
            f"The weight of a {type(host).__name__} is quantised by {kind or 'something unknown'}, "
            'which is not done again here: merge with quantized="dequantize".'
        )
    bnb = _bitsandbytes()
    if kind == "int8":
        codes, scales, _ = bnb.functional.int8_vectorwise_quant(value.to(torch.float16))
        return bnb.nn.Int8Params(codes, requires_grad=False, CB=codes, SCB=scales)
    settings = {
        "blocksize": weight.blocksize,
        "compress_statistics": weight.quant_state.nested,
        "quant_type": weight.quant_type,
        "quant_storage": weight.quant_storage,
    }
    like = value.to(weight.quant_state.dtype).contiguous()
    codes, state = bnb.functional.quantize_4bit(like, **settings)
    return bnb.nn.Params4bit(
        codes,
        requires_grad=False,
        quant_state=state,
        module=weight.module,
        bnb_quantized=True,
        **settings,
    )


def put(host: nn.Module, weight: nn.Parameter) -> None:
    """Gives a host a packed weight, and its own copies of the scales what belongs to it."""
    host._parameters["weight"] = weight
    made: Any = weight
    if hasattr(weight, "quant_state"):
        host.quant_state = made.quant_state
    if type(weight).__name__ == "Int8Params":
        state: Any = host.state
        made.CB = weight.data
        state.CB = state.SCB = None  # taken from the weight when the host runs


def taken(host: nn.Module) -> nn.Parameter:
    """Returns a host's packed weight with its scales on it, so that `put` can bring it back."""
    weight: Any = host._parameters["weight"]
    if kind_of(host) == "int8":
        weight.SCB, weight.CB = _scales(host), weight.data
    return weight


def keep_exact(model: nn.Module) -> None:
    """Keeps bitsandbytes from rounding a 4-bit model's scales for good when it runs on a CPU.

    On CPUs that compute in bfloat16 a forward without gradient packs codes anew, scales rounded to
    bfloat16, and going back quantises these once more: training and evaluating in turn would let
    the base drift, 3e-3 of a weight at first.
    """
    for host in model.modules():
        if getattr(host, "support_avx512bf16_for_cpu", False):
            host.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
            weight: Any = host._parameters["weight"]
            if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
                weight.data, weight.quant_state = _as_quantised(weight.data, weight.quant_state)


def share_tables(model: nn.Module) -> None:
    """Lets a model's 4-bit weights have one table of 16 values, and one of the scales' 256.

    Each has its own of them when it is quantised, 1,088 bytes: 0.02 bits a parameter where linears
    are 576 wide. In a state dict each has its own again, as a file must.
    """
    tables: dict[tuple[torch.device, bytes], Tensor] = {}
    for host in model.modules():
        state: Any = getattr(host._parameters.get("weight"), "quant_state", None)
        while state is not None:
            key = state.code.device, state.code.cpu().numpy().tobytes()
            state.code = tables.setdefault(key, state.code)
            state = state.state2 if state.nested else None
    if tables:
        model.register_state_dict_post_hook(_copy_tables)


def _copy_tables(
    model: nn.Module, tensors: dict[str, Tensor], prefix: str, metadata: dict[str, Any]
) -> None:
    for name in tensors:
        if name.endswith("quant_map"):
            tensors[name] = tensors[name].clone()


def _as_quantised(codes: Tensor, state: Any) -> tuple[Tensor, Any]:
    """Returns 4-bit codes and their state in the order of the numbers."""
    if not getattr(state, "packing_format_for_cpu", False):
        return codes, state
    return _bitsandbytes().functional._convert_weight_packed_for_cpu_inverse(codes, state)


def _bitsandbytes() -> Any:
    return importlib.import_module("bitsandbytes")


def _scales(host: nn.Module) -> Tensor:
    weight: Any = host._parameters["weight"]
    return weight.SCB if weight.SCB is not None else host.state.SCB  # type: ignore[union-attr]


@dataclass(frozen=True)
class Opened:
    """A host that was quantised and is a plain linear for the time being."""

    host: nn.Module
    kind: type[nn.Module]
    weight: nn.Parameter

    @classmethod
    def of(cls, host: nn.Module, dtype: torch.dtype) -> Opened:
        """Makes a quantised host a plain linear, in place, so that what hangs on it stays there."""
        made = cls(host, type(host), taken(host))
        value = numbers(host).to(dtype)
        host._parameters["weight"] = nn.Parameter(value, requires_grad=False)
        host.__class__ = nn.Linear
        return made

    def close(self) -> None:
        """Makes the host what it was, bit for bit."""
        self.host.__class__ = self.kind
        put(self.host, self.weight)


_MARKS = ("hf_quantizer", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit")


@dataclass(frozen=True)
class OpenedModel:
    """A quantised model whose linears are plain ones for the time being; see `open_model`."""

    hosts: tuple[Opened, ...]
    marks: dict[str, Any]
    config: Any

    def holds(self, host: nn.Module) -> bool:
        """Whether a host is one of those that are plain for the time being."""
        return any(host is one.host for one in self.hosts)

    def close(self, model: nn.Module) -> None:
        """Makes the model what it was, bit for bit."""
        for host in self.hosts:
            host.close()
        model.__dict__.update(self.marks)
        if self.config is not None:
            model.config.quantization_config = self.config  # type: ignore[union-attr]


def open_model(model: nn.Module) -> OpenedModel:
    """Makes all quantised linears of a model plain ones, and the model one like any other.

    Raises:
        AdapterError: a quantiser is not known; nothing has changed then.
    """
    found = [module for module in model.modules() if kind_of(module) is not None]
    dtype = getattr(model, "dtype", torch.float32)
    opened = tuple(Opened.of(host, _dtype(host, dtype)) for host in found)
    marks = {name: model.__dict__.pop(name) for name in _MARKS if name in model.__dict__}
    if "is_quantized" in model.__dict__:
        marks["is_quantized"] = model.__dict__["is_quantized"]
        model.is_quantized = False  # type: ignore[assignment]
    settings: Any = getattr(model, "config", None)
    config = getattr(settings, "quantization_config", None)
    if config is not None:
        del settings.quantization_config
    return OpenedModel(opened, marks, config)


def _dtype(host: nn.Module, usual: torch.dtype) -> torch.dtype:
    """Returns the dtype that a host's numbers are computed in."""
    state: Any = getattr(host._parameters["weight"], "quant_state", None)
    return usual if state is None else state.dtype
