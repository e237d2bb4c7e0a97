"""Base models in 4 or 8 bit: which, what they need, and how transformers is told.

    nf4, fp4, int8                 bitsandbytes, on GPUs and CPUs
    torchao-int8, torchao-int4     torchao; int4 on CUDA devices alone

Only linears inside the blocks are quantised: embeddings, norms, routers and every head stay as they
are, and T5's `wo`, which transformers keeps in float32.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from graftune.anatomy.packed import is_packed
from graftune.errors import SettingsError, nearest

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig

    from graftune.attached import Adapter

SCHEMES = ("nf4", "fp4", "int8", "torchao-int8", "torchao-int4")
FOUR_BITS = SCHEMES[:2]
WIDTH = 64
"""On a CPU, 4-bit linears have a multiple of so many inputs, which is a block: bitsandbytes' kernel
reads the wrong scales where a row ends inside one (0.50.2, widths such as 32, 48 and 96)."""


class Asked(Protocol):
    """Settings that say whether a base is quantised."""

    @property
    def quantize(self) -> str | None:
        """How."""
        ...

    @property
    def double_quant(self) -> bool:
        """Whether scales are quantised too."""
        ...


@dataclass(frozen=True)
class Quantising:
    """How a base's linears are quantised when it is loaded.

    Raises:
        SettingsError: there is no such scheme.
    """

    scheme: str
    double: bool = True
    """Quantise the scales too (of 4 bits, by bitsandbytes)."""

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            raise SettingsError(
                f'quantize is "{self.scheme}"; expected one of {", ".join(SCHEMES)}.'
                f"{nearest(self.scheme, SCHEMES)}"
            )

    @classmethod
    def asked(cls, settings: Asked) -> Quantising | None:
        """Returns what a run's training settings ask for."""
        return None if settings.quantize is None else cls(settings.quantize, settings.double_quant)

    @classmethod
    def told(cls, task: Mapping[str, Any]) -> Quantising | None:
        """Returns what a run wrote beside its adapter."""
        scheme = task.get("quantize")
        return None if scheme is None else cls(scheme, task.get("double_quant", True))

    def check(self) -> None:
        """Checks that this machine can do it.

        Raises:
            SettingsError: a package is missing, or there is no kernel for its device.
        """
        package = "torchao" if self.scheme.startswith("torchao") else "bitsandbytes"
        check_package(package, f"train.quantize: {self.scheme}")
        if self.scheme == "torchao-int4" and device() == "cpu":
            raise SettingsError(
                "train.quantize: torchao-int4 has no kernel for this machine's device, a CPU; "
                "nf4 is the 4-bit scheme that has one, torchao-int8 torchao's."
            )

    @property
    def width(self) -> int:
        """What a linear's inputs are a multiple of, if it is quantised here."""
        return WIDTH if self.scheme in FOUR_BITS and device() == "cpu" else 1

    def config(self, dtype: Any, skip: list[str]) -> Any:
        """Returns transformers' own settings for it.

        Args:
            dtype: that the linears compute in.
            skip: the names of linears left as they are.
        """
        from transformers import BitsAndBytesConfig, TorchAoConfig

        if self.scheme.startswith("torchao"):
            return TorchAoConfig(_torchao(self.scheme), modules_to_not_convert=skip)
        if self.scheme == "int8":
            return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.scheme,
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_use_double_quant=self.double,
            llm_int8_skip_modules=skip,
        )


def _torchao(scheme: str) -> Any:
    torchao: Any = importlib.import_module("torchao.quantization")
    if scheme == "torchao-int8":
        return torchao.Int8WeightOnlyConfig(version=2)
    return torchao.Int4WeightOnlyConfig(int4_packing_format="tile_packed_to_4d")


def keep_in(adapter: Adapter, precision: str) -> None:
    """Gives what an adapter trains a type.

    Raises:
        SettingsError: its method needs float32.
    """
    import torch

    if precision == "float32":
        return
    if adapter.method.name == "LoReFT":
        raise SettingsError(
            f"train.adapter_precision: {adapter.method.name} needs float32, found {precision}: its "
            "rotation is made orthogonal in each step, which 16 bit can't be."
        )
    for tensor in adapter.parameters():
        tensor.data = tensor.data.to(getattr(torch, precision))


def check_package(package: str, what: str) -> None:
    """Raises SettingsError where a quantiser's package is missing; hushes what it warns of.

    bitsandbytes warns of each cast of an int8 linear's input, and of a kernel that it does without.
    """
    if importlib.util.find_spec(package) is None:
        extra = "" if package == "torchao" else ' (or "graftune[quant]")'
        raise SettingsError(f"{what} needs the package {package}: pip install {package}{extra}")
    logging.getLogger(package).setLevel(logging.ERROR)


def check_plain(config: PreTrainedConfig, spec: str, asked: Quantising | None) -> None:
    """Checks that a base isn't quantised twice, and that what quantised it is here.

    Raises:
        SettingsError: it is quantised already; or its quantiser is missing.
    """
    found: Any = getattr(config, "quantization_config", None)
    if not found:
        return
    said = found if isinstance(found, dict) else found.to_dict()
    by = str(said.get("quant_method", "something unknown")).removeprefix("QuantizationMethod.")
    if asked is not None:
        raise SettingsError(
            f'the base "{spec}" is quantised already (by {by}), so it can\'t be quantised to '
            f"{asked.scheme}: leave train.quantize out, or give the model it was made from."
        )
    if by in ("bitsandbytes", "torchao"):
        check_package(by, f'the base "{spec}"')


def check_done(model: nn.Module, asked: Quantising) -> None:
    """Raises SettingsError where no linear of a model just loaded is quantised."""
    if any(is_packed(tensor) for tensor in model.parameters()):
        return
    widths = f", whose inputs are a multiple of {asked.width}" if asked.width > 1 else ""
    raise SettingsError(
        f"train.quantize: {asked.scheme} finds nothing to quantise: this {type(model).__name__} "
        f"has no linear in its blocks{widths}; leave it out."
    )


def left_alone(kind: Any, config: PreTrainedConfig, width: int = 1) -> list[str]:
    """Returns the names of the linears outside a model's blocks, and of routers inside.

    Args:
        kind: the auto class that the model is made by.
        config: its configuration.
        width: linears inside are left alone too if their inputs are no multiple of it.
    """
    import torch

    from graftune.anatomy import anatomy
    from graftune.anatomy.modules import is_in, is_router, linear_shape

    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model: nn.Module = kind.from_config(config)
    blocks = [block.path for block in anatomy(model).blocks]
    found: list[str] = []
    for name, module in model.named_modules():
        shape = linear_shape(module)
        if shape is None:
            continue
        inside = is_in(name, blocks) and not is_router(name, module)
        if not inside or shape[0] % width:
            found.append(name)
    return found


def device() -> str:
    """Returns where a quantised base is put: the first GPU, or the CPU."""
    import torch

    return "cuda:0" if torch.cuda.is_available() else "cpu"
