"""LOKR: HF PEFT's LoKr, for linears and convolutions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from graftune.errors import FormatError
from graftune.formats.peft_factors import LycorisType, own_grafts
from graftune.methods.base import Method
from graftune.methods.lokr import Kronecker, LoKr
from graftune.sites.base import Delta, Graft

if TYPE_CHECKING:
    from graftune.adapter import Adapter


class _LoKr(LycorisType):
    """See the module."""

    name = "LOKR"
    method = "LoKr"
    names = {  # noqa: RUF012
        "W1": "lokr_w1",
        "W1a": "lokr_w1_a",
        "W1b": "lokr_w1_b",
        "W2": "lokr_w2",
        "W2a": "lokr_w2_a",
        "W2b": "lokr_w2_b",
        "T2": "lokr_t2",
    }
    defaults = {  # noqa: RUF012
        **LycorisType.defaults,
        "decompose_both": False,
        "decompose_factor": -1,
        "init_weights": True,
        "rank_dropout_scale": False,
    }
    turned = ("W2a",)
    core = "T2"

    def obstacle(self, adapter: Adapter) -> str | None:
        """See `PeftType.obstacle`."""
        other = _otherwise(adapter.model, adapter.grafts)
        return super().obstacle(adapter) or (
            f"HF PEFT's LoKr computes {other}, a 1-D convolution with W2 whole, otherwise"
            if other
            else None
        )

    def own_tensors(
        self, model: nn.Module, grafts: Sequence[Graft], tensors: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """See `PeftType.own_tensors`.

        Raises:
            FormatError: a change isn't the Kronecker product of its factors.
        """
        other = _otherwise(model, grafts)
        if other:
            raise FormatError(
                f"{other} is a 1-D convolution with W2 whole, of which HF PEFT makes something "
                "else than the Kronecker product of W1 and W2: not supported. With a smaller r W2 "
                "has a rank, and the two agree."
            )
        return super().own_tensors(model, grafts, tensors)

    def settings(self, adapter: Adapter) -> dict[str, Any]:
        """See `PeftType.settings`."""
        method = adapter.method
        assert isinstance(method, LoKr)
        return {
            **super().settings(adapter),
            "decompose_both": method.decompose_both,
            "decompose_factor": method.decompose_factor,
            "init_weights": "lycoris" if method.init == "lycoris" else True,
            "rank_dropout_scale": method.rank_dropout_scale,
        }

    def method_of(
        self, config: Mapping[str, Any], modules: Sequence[str], heads: Sequence[str]
    ) -> Method:
        """See `PeftType.method_of`."""
        return LoKr(
            **self.common(config, modules, heads),
            decompose_both=config["decompose_both"],
            decompose_factor=config["decompose_factor"],
            init="lycoris" if config["init_weights"] == "lycoris" else "zero-W1",
            rank_dropout_scale=config["rank_dropout_scale"],
        )

    def _kernel(self, delta: Delta, name: str, tensor: Tensor) -> Tensor:
        assert isinstance(delta, Kronecker)
        if name == "W2" and delta.kernel:
            return tensor.unflatten(1, (-1, *delta.kernel))
        return super()._kernel(delta, name, tensor)


def _otherwise(model: nn.Module, grafts: Sequence[Graft]) -> str | None:
    """Returns a module for which PEFT multiplies W1 `(a, b)` and W2 `(c, e, taps)` in 3 dimensions.

    torch.kron then pairs b with the taps, and reshaping doesn't bring them back (PEFT 0.21).
    """
    for graft in own_grafts(grafts):
        host = model.get_submodule(graft.place.module)
        if isinstance(host, nn.Conv1d) and getattr(graft.delta, "W2", None) is not None:
            return graft.place.module
    return None


TYPE = _LoKr()
