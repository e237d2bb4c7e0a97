"""Where the first number that isn't finite came from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


class _Watch:
    """Notes the first module that returns a number which isn't finite."""

    def __init__(self, model: nn.Module) -> None:
        self.names = {module: name for name, module in model.named_modules()}
        self.found: tuple[str, nn.Module, int, int] | None = None

    def seen(self, module: nn.Module, _inputs: Any, output: Any) -> None:
        if self.found is not None:
            return
        for tensor in _tensors(output):
            bad = _count_bad(tensor)
            if bad:
                self.found = (self.names[module] or "the model", module, bad, tensor.numel())
                return


def first_nonfinite(
    model: nn.Module,
    inputs: Mapping[str, Any],
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> str:
    """Returns a clause that names the first module whose output isn't finite, and why.

    Runs the model once more on `inputs`, without gradients, in the mode it is in, by `forward`
    where a batch isn't what the model takes. Modules are taken in the order in which they finish,
    so an inner one is named before the ones around it.
    """
    watch = _Watch(model)
    handles = [module.register_forward_hook(watch.seen) for module in watch.names]
    try:
        with torch.no_grad():
            model(**inputs) if forward is None else forward(model, dict(inputs))
    finally:
        for handle in handles:
            handle.remove()
    if watch.found is None:
        return _without_module(model)
    name, module, bad, total = watch.found
    clause = (
        f'"{name}" is the first module whose output isn\'t finite ({bad:,} of {total:,} values)'
    )
    weights = nonfinite_parameter(module)
    return f"{clause}; {weights} isn't finite either" if weights else f"{clause}; its weights are"


def nonfinite_parameter(model: nn.Module) -> str | None:
    """Returns the name of the first parameter with a value that isn't finite."""
    for name, parameter in model.named_parameters():
        if _count_bad(parameter):
            return f'"{name}"'
    return None


def nonfinite_gradient(model: nn.Module) -> str | None:
    """Returns the name of the first parameter with a gradient that isn't finite."""
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and _count_bad(parameter.grad):
            return f'"{name}"'
    return None


def _without_module(model: nn.Module) -> str:
    weights = nonfinite_parameter(model)
    if weights:
        return f"the parameter {weights} isn't finite"
    gradient = nonfinite_gradient(model)
    if gradient:
        return f"every output is finite, the gradient of {gradient} isn't"
    return "a second pass over the batch was finite, so it came by chance (dropout) or in the loss"


def _count_bad(tensor: Tensor) -> int:
    """Additive masks hold −inf on purpose, but no module returns one."""
    if tensor.is_meta or not (tensor.is_floating_point() or tensor.is_complex()):
        return 0
    return int(tensor.numel() - torch.isfinite(tensor).sum())


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, (list, tuple)):
        return [tensor for part in output for tensor in _tensors(part)]
    return []
