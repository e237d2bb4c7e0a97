"""LOHA: HF PEFT's LoHa, for linears and convolutions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from graftune.formats.peft_factors import LycorisType
from graftune.methods.base import Method
from graftune.methods.loha import LoHa


class _LoHa(LycorisType):
    """See the module."""

    name = "LOHA"
    method = "LoHa"
    names = {  # noqa: RUF012
        "B1": "hada_w1_a",
        "A1": "hada_w1_b",
        "T1": "hada_t1",
        "B2": "hada_w2_a",
        "A2": "hada_w2_b",
        "T2": "hada_t2",
    }
    without_effect = ("init_weights",)
    turned = ("B1", "B2")
    core = "T1"

    def method_of(
        self, config: Mapping[str, Any], modules: Sequence[str], heads: Sequence[str]
    ) -> Method:
        """See `PeftType.method_of`."""
        return LoHa(**self.common(config, modules, heads))


TYPE = _LoHa()
