"""Whether an optimizer of transformers' can run here, tried on two tensors before any work."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import transformers
from torch import nn
from transformers import TrainingArguments

from graftune.errors import TrainingError

_TRIED = (128, 64)
"""Shape that 8-bit optimizers quantise: smaller tensors keep their state in 32 bits."""
_MADE_OF_TORCH = ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop")


def check_optimizer(args: TrainingArguments) -> None:
    """Makes the optimizer that `args` names and takes a step with it, where it may not be able to.

    8-bit and paged optimizers need bitsandbytes with kernels for the device, others a package of
    theirs.

    Raises:
        TrainingError: its package is missing, or it has no kernel for the device.
    """
    name = str(getattr(args.optim, "value", args.optim))
    if name in _MADE_OF_TORCH:
        return
    drawn: Any = nn.ParameterList([torch.ones(_TRIED), torch.ones(3)]).to(args.device)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kind, options = transformers.Trainer.get_optimizer_cls_and_kwargs(args)
            if not isinstance(kind, type) or options.keys() & {"params", "model", "optimizer_dict"}:
                return  # made of a model's own parts
            optimizer: Any = kind(list(drawn), **options)
            for parameter in drawn:
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
    except Exception as error:  # whatever a package raises without its kernels
        why = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else ""
        raise TrainingError(
            f'the optimizer "{name}" can\'t run on the {args.device.type} here: '
            f"{type(error).__name__}{': ' if why else ''}{why}."
        ) from error
