"""LOKR: HF PEFT's LoKr, for linears and convolutions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from graftune.formats.peft_factors import LycorisType
from graftune.methods.base import Method
from graftune.methods.lokr import Kronecker, LoKr
from graftune.sites.base import Delta

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


TYPE = _LoKr()
