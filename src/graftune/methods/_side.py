"""A side network: the body's own class, narrower, its blocks fed from the trunk through gates."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftune.anatomy import Anatomy, Block, Stack, anatomy, table
from graftune.anatomy.modules import is_embedding, is_in
from graftune.errors import SettingsError
from graftune.sites.attending import AttendAgain
from graftune.sites.base import TrunkDelta
from graftune.sites.kept import Kept, first, thread_id

_BEFORE = re.compile(r"emb|(^|\.)pre_la")
"""Names of norms outside blocks that run before them."""


class Ladder(TrunkDelta):
    """The side of one body. Shapes: maps from the trunk (n, r) and (L', n, r), up (d, n).

    Attributes:
        body: the narrow model; of it, blocks and what they and their answer need are trained.
        gates: alpha of every block of the trunk, `(L,)`; those of dropped blocks do nothing.
    """

    def __init__(
        self, body: nn.Module, shape: SideShape, temperature: float, *, adds: bool, dropout: bool
    ) -> None:
        super().__init__()
        n, d, device = shape.width, shape.trunk_width, next(body.parameters()).device
        self.config: Any = body.config
        self.width, self.trunk_width, self.trunk_dropout = n, d, dropout
        self.layers, self.temperature, self.adds = shape.layers, temperature, adds
        self.kept = Kept()
        self.body = body
        self.enter_weight, self.enter_bias = _map(n, d, device)
        self.down_weight, self.down_bias = _map(n, d, device, len(shape.layers))
        self.gates = nn.Parameter(torch.zeros(shape.depth, device=device))
        if shape.has_end:
            self.up_weight, self.up_bias = _map(d, n, device)
            if adds:
                nn.init.zeros_(self.up_weight)
                nn.init.zeros_(self.up_bias)
        blocks = [body.get_submodule(path) for path in shape.blocks]
        for block in blocks:
            block.register_forward_pre_hook(self.climb, with_kwargs=True)
        within = [module for block in blocks for module in block.modules()]
        self.has_bias = any(isinstance(module, nn.Embedding) for module in within)  # of positions

    def blank(self, entering: Tensor) -> Tensor:
        """See `TrunkDelta.blank`: zeros, since `climb` puts the first state in."""
        rows, tokens = entering.shape[:2]
        return self.enter_weight.new_zeros(rows, tokens, self.width)

    def side_states(self, hidden: list[Tensor], given: dict[str, Any]) -> Tensor:
        """See `TrunkDelta.side_states`."""
        for module in self.body.modules() if self.training else ():
            if module.__dict__.get("gradient_checkpointing"):
                module.__dict__["gradient_checkpointing"] = (
                    False  # it would redo more than it saves
                )
        self.kept["rung", thread_id()] = [0, hidden]
        attention = AttendAgain() if self.training and self.has_bias else nullcontext()
        try:
            with attention:
                return self.body(**given).last_hidden_state
        finally:
            self.kept.pop(("rung", thread_id()), None)

    def climb(self, block: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Mixes the trunk's state into what enters a side block. A forward pre-hook of it.

        s <- mu s + (1 - mu) P h        mu = sigmoid(alpha / T), h what leaves the trunk's block
        """
        rung = self.kept["rung", thread_id()]
        at, hidden = rung
        rung[0] += 1
        layer = self.layers[at]
        side = first(args, kwargs)
        if at == 0:
            side = self._mapped(hidden[0], self.enter_weight, self.enter_bias)
        seen = self._mapped(hidden[layer + 1], self.down_weight[at], self.down_bias[at])
        hidden[: layer + 2] = [hidden[layer + 1].new_empty(0)] * (layer + 2)  # read: let go
        mu = torch.sigmoid(self.gates[layer] / self.temperature)
        mixed = mu * side + (1 - mu) * seen
        return ((mixed, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": mixed})

    def ended(self, last: Tensor, side: Tensor) -> Tensor:
        """See `TrunkDelta.ended`."""
        answer = F.linear(side, self.up_weight, self.up_bias).to(last.dtype)
        return last + answer if self.adds else answer

    @staticmethod
    def _mapped(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.linear(hidden.to(weight.dtype), weight, bias)


def _map(out: int, fan_in: int, device: Any, *many: int) -> tuple[nn.Parameter, nn.Parameter]:
    """Returns weight and bias of maps that start as torch's linears do."""
    bound = 1 / math.sqrt(fan_in)
    weight = torch.empty(*many, out, fan_in, device=device).uniform_(-bound, bound)
    bias = torch.empty(*many, out, device=device).uniform_(-bound, bound)
    return nn.Parameter(weight), nn.Parameter(bias)


@dataclass(frozen=True)
class SideShape:
    """What a side network is like, before it is made."""

    width: int
    trunk_width: int
    depth: int
    """Blocks of the trunk."""
    layers: tuple[int, ...]
    """Positions of those that the side has one for."""
    blocks: tuple[str, ...]
    """Paths of the side's blocks in its body."""
    has_end: bool
    """Whether it ends in a map back to the trunk's width."""


def narrow_config(
    method: str,
    config: Any,
    layers: Sequence[int],
    depth: int,
    by: int,
    dropout: float | None,
) -> Any:
    """Returns a copy of a body's config, all widths divided and the blocks those of `layers`.

    Args:
        method: for errors.
        config: the body's.
        layers: positions of the blocks that stay.
        depth: how many there are.
        by: what widths are divided by.
        dropout: every rate of dropout, None for the config's own.

    Raises:
        SettingsError: a width doesn't divide.
    """
    made = copy.deepcopy(config)
    plain = config.to_dict()
    for name, value in plain.items():
        if name in table.WIDTHS and isinstance(value, int) and not isinstance(value, bool):
            if value % by:
                raise SettingsError(
                    f"{method}: reduction is {by}, which doesn't divide {name}={value} of this "
                    f"{type(config).__name__}; {_suggested(plain)}"
                )
            setattr(made, name, value // by)
        elif name in table.DEPTHS and value == depth:
            setattr(made, name, len(layers))
        elif isinstance(value, list) and len(value) == depth and name.endswith(("types", "layers")):
            setattr(made, name, [value[at] for at in layers])
        elif "drop" in name and isinstance(value, float) and dropout is not None:
            setattr(made, name, dropout)
    _check_heads(method, plain, by)
    if "vocab_size" in plain:
        made.vocab_size = 1  # its embeddings are never read
        made.pad_token_id = 0 if plain.get("pad_token_id") is not None else None
    return made


def _check_heads(method: str, plain: dict[str, Any], by: int) -> None:
    """Raises SettingsError where a narrow hidden state isn't a whole number of heads."""
    width = _width_of(plain) // by
    for name, heads in _heads(plain).items():
        if width % heads:
            raise SettingsError(
                f"{method}: reduction is {by}, which leaves a width of {width} for the {heads} "
                f"heads of {name}; {_suggested(plain)}"
            )


def _heads(plain: dict[str, Any]) -> dict[str, int]:
    """Returns into how many heads a state is cut, by setting; {} where heads have a width."""
    if any(isinstance(plain.get(name), int) for name in ("d_kv", "head_dim")):
        return {}
    return {k: v for k, v in plain.items() if k in table.HEADS and isinstance(v, int)}


def _width_of(plain: dict[str, Any]) -> int:
    return next(plain[k] for k in ("hidden_size", "d_model", "n_embd", "dim") if k in plain)


def _suggested(plain: dict[str, Any]) -> str:
    """Returns a sentence that names reductions that fit."""
    widths = [v for k, v in plain.items() if k in table.WIDTHS and isinstance(v, int) and v]
    heads, width = _heads(plain).values(), _width_of(plain)
    fits = [
        by
        for by in range(1, 65)
        if all(one % by == 0 for one in widths) and all((width // by) % n == 0 for n in heads)
    ]
    return f"what divides is {', '.join(map(str, fits))}."


class Narrow(NamedTuple):
    """The body of a side."""

    body: nn.Module
    blocks: tuple[Block, ...]


def side_body(model: nn.Module, host: str, config: Any, device: Any) -> Narrow:
    """Returns a body of the same class from a narrow config, what never trains in it set aside."""
    kind: Any = type(model.get_submodule(host))
    with torch.device(device):
        body = kind(config)
    found = anatomy(body)
    inside = tuple(block.path for block in found.blocks)
    for path, module in body.named_modules():
        module._is_hf_initialized = True  # type: ignore[assignment]
        if not _trains(path, module, found, inside):
            for name, tensor in list(module._parameters.items()):
                if tensor is not None:
                    del module._parameters[name]
                    module.register_buffer(name, tensor.detach(), persistent=False)
        module._non_persistent_buffers_set.update(module._buffers)
    return Narrow(body, found.blocks)


def _trains(path: str, module: nn.Module, found: Anatomy, inside: tuple[str, ...]) -> bool:
    """Whether a module of a side's body is in or behind its blocks, so that it can learn."""
    if is_in(path, inside) or path in found.read_by_parent:
        return True
    if path in found.once_for_all_rows:
        return not is_embedding(module)
    return path in found.norms and _BEFORE.search(path) is None


def shape_of(stack: Stack, narrow: Narrow, layers: Sequence[int], *, has_end: bool) -> SideShape:
    """Returns the shape of a side's body beside a stack."""
    paths = tuple(block.path for block in narrow.blocks)
    width, trunk = narrow.blocks[0].width, stack.blocks[0].width
    return SideShape(width, trunk, len(stack.blocks), tuple(layers), paths, has_end)
