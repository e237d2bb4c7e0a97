"""What a planned training is told: how it would be trained, and on what device."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from graftune.errors import SettingsError, nearest

PRECISIONS = ("float32", "bfloat16", "float16")
QUANTISERS = ("int8", "nf4", "fp4")
DEVICES = ("cpu", "cuda")
OFFLOADS = ("optimizer", "activations", "parameters")


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """How a step is trained, checked when made.

    Raises:
        SettingsError: a value can't be; the nearest right one is named.
    """

    batch_size: int = 8
    """Rows of a batch."""
    length: int = 512
    """Tokens of each row, padding included; what an encoder reads in an encoder-decoder."""
    target_length: int = 64
    """Tokens of each answer of an encoder-decoder."""
    image_size: int | None = None
    """Height and width of images; None: the model's own."""
    labels: int = 2
    """Outputs of a new classification head."""
    precision: str = "float32"
    """Type of the base's weights: float32, bfloat16 or float16. Adapters train in float32."""
    quantize: str | None = None
    """How the base's linears are kept: None, int8, nf4 or fp4."""
    double_quant: bool = False
    """Whether the scales of nf4 or fp4 are quantised too."""
    optimizer: str = "adamw_torch_fused"
    """Optimizer by transformers' name."""
    accumulation: int = 1
    """Batches whose gradients are summed to one step."""
    gradient_checkpointing: bool = False
    """Whether activations are computed twice to keep fewer of them."""
    loss_chunk: int | None = None
    """Tokens of which a language model's logits and loss are computed at once; None: all."""
    offload: tuple[str, ...] = ()
    """What lies in the host's memory: optimizer, activations, parameters."""
    max_grad_norm: float = 1.0
    """Norm that gradients are cut to; 0: they aren't."""
    device: str = "cpu"
    """What kernels it is planned for: cpu or cuda. Neither has to be there."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "offload", _words(self.offload))
        for name in ("batch_size", "length", "target_length", "labels", "accumulation"):
            _check_count(name, getattr(self, name))
        for name in ("image_size", "loss_chunk"):
            if getattr(self, name) is not None:
                _check_count(name, getattr(self, name))
        _check_choice("precision", self.precision, PRECISIONS)
        _check_choice("device", self.device, DEVICES)
        if self.quantize is not None:
            _check_choice("quantize", self.quantize, QUANTISERS)
        if self.double_quant and self.quantize not in ("nf4", "fp4"):
            raise SettingsError(
                f'double_quant is for quantize="nf4" or "fp4", found quantize={self.quantize!r}.'
            )
        for word in self.offload:
            _check_choice("offload", word, OFFLOADS)
        if self.offload and self.device == "cpu":
            raise SettingsError(
                f"offload is {', '.join(self.offload)}, but on the CPU there is no other memory to "
                'move to: plan it for device="cuda".'
            )
        _check_optimizer(self.optimizer)

    @classmethod
    def of(cls, **values: Any) -> PlanSettings:
        """Returns settings of names that are checked; None takes the default.

        Raises:
            SettingsError: as for the class, and for a name that isn't one.
        """
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                raise SettingsError(
                    f'A plan has no setting "{name}"; it has {", ".join(known)}.'
                    f"{nearest(name, known)}"
                )
        return cls(**{name: value for name, value in values.items() if value is not None})


def _words(value: Any) -> tuple[str, ...]:
    given = value.split(",") if isinstance(value, str) else value
    return tuple(word.strip() for word in given if word.strip())


def _check_count(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise SettingsError(f"{name} is {value!r}, expected a whole number of at least 1.")


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise SettingsError(
            f"{name} is {value!r}, expected one of {', '.join(choices)}."
            f"{nearest(str(value), choices)}"
        )


def _check_optimizer(name: str) -> None:
    from graftune.planning.optimizers import known

    choices = known()
    if name not in choices:
        raise SettingsError(
            f'optimizer is "{name}", which can\'t be planned; there are {", ".join(choices)}.'
            f"{nearest(name, choices)}"
        )
