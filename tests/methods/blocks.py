"""Blocks computed by hand, sublayer by sublayer, with adapters where the papers' formulas put them.

The modules are those of a plain twin of the adapted model; what they are called with beside the
hidden states (masks, positions, the encoder's answer) is what the adapted model called them with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graftune as gt
from graftune.methods.base import Method
from tests.contract.subjects import shake
from tests.families import FAMILIES


class Sub(NamedTuple):
    """A sublayer by its modules' names in the block."""

    kind: str
    pre: str | None
    """The norm before it."""
    chain: tuple[str, ...]
    """What runs one after the other."""
    post: str | None = None
    """The norm of the sum."""


def _pre(kind: str, norm: str, *chain: str) -> Sub:
    return Sub(kind, norm, chain)


LLAMA = (
    _pre("attention", "input_layernorm", "self_attn"),
    _pre("ffn", "post_attention_layernorm", "mlp"),
)
SUBLAYERS: dict[str, tuple[Sub, ...]] = {
    "bert": (
        Sub(
            "attention",
            None,
            ("attention.self", "attention.output.dense"),
            "attention.output.LayerNorm",
        ),
        Sub("ffn", None, ("intermediate", "output.dense"), "output.LayerNorm"),
    ),
    "distilbert": (
        Sub("attention", None, ("attention",), "sa_layer_norm"),
        Sub("ffn", None, ("ffn",), "output_layer_norm"),
    ),
    "gpt2": (_pre("attention", "ln_1", "attn"), _pre("ffn", "ln_2", "mlp")),
    "llama": LLAMA,
    "mixtral": LLAMA,
    "gemma2": (
        _pre("attention", "input_layernorm", "self_attn", "post_attention_layernorm"),
        _pre("ffn", "pre_feedforward_layernorm", "mlp", "post_feedforward_layernorm"),
    ),
    "gpt_neox": (
        _pre("attention", "input_layernorm", "attention"),
        _pre("ffn", "post_attention_layernorm", "mlp"),
    ),
    "bloom": (
        _pre("attention", "input_layernorm", "self_attention"),
        _pre("ffn", "post_attention_layernorm", "mlp"),
    ),
    "opt": (
        _pre("attention", "self_attn_layer_norm", "self_attn"),
        _pre("ffn", "final_layer_norm", "fc1", "activation_fn", "fc2"),
    ),
    "vit": (
        _pre("attention", "layernorm_before", "attention"),
        _pre("ffn", "layernorm_after", "mlp"),
    ),
    "t5": (
        _pre("attention", "layer.0.layer_norm", "layer.0.SelfAttention"),
        _pre("cross-attention", "layer.1.layer_norm", "layer.1.EncDecAttention"),
        _pre("ffn", "layer.-1.layer_norm", "layer.-1.DenseReluDense"),
    ),
}
"""By family, in the order they run."""

Call = tuple[tuple[Any, ...], dict[str, Any], Any]
Placed = Callable[[str, Tensor, Tensor, Tensor, Any], Tensor]
"""(kind, h, x, s, norm) to what the stream is after a sublayer that saw s and answered h."""


class Recorded:
    """A forward pass of an adapted model: each module's arguments and output, and a plain twin."""

    def __init__(self, family: str, model: nn.Module) -> None:
        self.family, self.model, self.twin = family, model, FAMILIES[family].build()
        self.calls: dict[str, Call] = {}
        handles = [m.register_forward_hook(self._keep(p), with_kwargs=True) for p, m in _all(model)]
        cache = {"use_cache": False} if FAMILIES[family].generates else {}
        with torch.no_grad():
            model(**FAMILIES[family].inputs(), **cache)
        for handle in handles:
            handle.remove()

    def _keep(self, path: str) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            self.calls[path] = (args, kwargs, output)

        return hook

    def block(self, path: str) -> tuple[Tensor, Tensor]:
        """Returns what entered a block of the adapted model and what left it."""
        args, kwargs, output = self.calls[path]
        return _first(args, kwargs), output[0] if isinstance(output, tuple) else output

    def by_hand(self, path: str, placed: Placed) -> Tensor:
        """Returns what a block makes of what entered it."""
        x, _ = self.block(path)
        subs = [s for s in SUBLAYERS[self.family] if self._has(path, s)]
        if self.family == "gpt_neox":  # both see what enters the block
            return x + sum(self._sub(path, sub, x, placed) - x for sub in subs)
        for sub in subs:
            x = self._sub(path, sub, x, placed)
        return x

    def _sub(self, path: str, sub: Sub, x: Tensor, placed: Placed) -> Tensor:
        with torch.no_grad():
            h = s = x if sub.pre is None else self._module(f"{path}.{sub.pre}")(x)
            for name in sub.chain:
                h = self._again(f"{path}.{name}", h)
            norm = None if sub.post is None else self._module(f"{path}.{sub.post}")
            return placed(sub.kind, h, x, s, norm)

    def _again(self, path: str, x: Tensor) -> Tensor:
        """Returns what the twin's module makes of x, called as the adapted model's was."""
        path = self._path(path)
        args, kwargs, _ = self.calls[path]
        if args:
            rest: Any = [torch.zeros_like(x) if a is args[1] else a for a in args[1:]]
            args = (x, *(rest if self.family == "bloom" else args[1:]))  # BLOOM's adds the residual
        else:
            kwargs = {**kwargs, "hidden_states": x}
        output = self.twin.get_submodule(path)(*args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    def _module(self, path: str) -> nn.Module:
        return self.twin.get_submodule(self._path(path))

    def _path(self, path: str) -> str:
        """Returns a path in which T5's last sublayer has its number."""
        home, _, rest = path.partition(".layer.-1")
        if not rest:
            return path
        layers: Any = self.twin.get_submodule(f"{home}.layer")
        return f"{home}.layer.{len(layers) - 1}{rest}"

    def _has(self, path: str, sub: Sub) -> bool:
        try:
            self._module(f"{path}.{sub.chain[0]}")
        except AttributeError:
            return False
        return True


def adapted(
    family: str, method: Method, noise: float = 0.2
) -> tuple[Recorded, dict[str, dict[str, Tensor]]]:
    """Returns a pass of a model with a shaken adapter, and its tensors by sublayer and name."""
    model = FAMILIES[family].build()
    adapter = gt.attach(model, method, seed=0)
    shake(adapter, seed=1, noise=noise)
    tensors: dict[str, dict[str, Tensor]] = {}
    for name, tensor in adapter.state_dict().items():
        place, _, own = name.rpartition(".adapter.")
        tensors.setdefault(place, {})[own] = tensor
    return Recorded(family, model), tensors


def change(own: Mapping[str, Tensor], z: Tensor, phi: Any = F.relu) -> Tensor:
    """Returns U phi(D z + c_D) + c_U, token by token."""
    inner = torch.einsum("kd,...d->...k", own["down"], z) + own["down_bias"]
    return torch.einsum("dk,...k->...d", own["up"], phi(inner)) + own["up_bias"]


def plainly(norm: Any, x: Tensor, h: Tensor) -> Tensor:
    """Returns the residual sum, normed in a post-norm block."""
    return x + h if norm is None else norm(x + h)


def blocks_of(recorded: Recorded) -> list[str]:
    """Returns the paths of the model's blocks."""
    return [block.path for block in gt.anatomy(recorded.twin).blocks]


def check_blocks(recorded: Recorded, placed_in: Callable[[str], Placed]) -> None:
    """Checks every block of an adapted model against one by hand, and that it isn't the base's."""
    for path in blocks_of(recorded):
        _, found = recorded.block(path)
        torch.testing.assert_close(
            found, recorded.by_hand(path, placed_in(path)), atol=2e-5, rtol=2e-5
        )
        base = recorded.by_hand(path, lambda kind, h, x, s, norm: plainly(norm, x, h))
        assert (found - base).abs().max() > 1e-3


def _all(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(p, m) for p, m in model.named_modules() if ".deltas" not in f".{p}"]


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]
