"""What HF PEFT's types of plain factors have in common: LOHA and LOKR wholly, VERA in part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from graftune.formats.peft_ranks import rank_settings, used, whole_number
from graftune.formats.peft_types.base import PeftType
from graftune.methods._lycoris import Lycoris
from graftune.sites import hosts
from graftune.sites.base import Delta, Graft, LinearPlace, ParameterPlace
from graftune.sites.parameter import OwnValue

if TYPE_CHECKING:
    from graftune.adapter import Adapter


class FactorsType(PeftType):
    """A type whose tensors lie below the modules they change, one name for one of ours."""

    names: ClassVar[Mapping[str, str]]
    """PEFT's names of a delta's tensors by ours."""
    kinds: ClassVar[tuple[str, ...]] = ("linear",)
    """What PEFT's type acts on: linear, Conv1D, conv, embedding."""

    def obstacle(self, adapter: Adapter) -> str | None:
        """See `PeftType.obstacle`."""
        for graft in own_grafts(adapter.grafts):
            what = _unlike(graft, adapter.model.get_submodule(graft.place.module))
            if what not in self.kinds:
                return f"HF PEFT's {self.method} doesn't act on {_WORDS[what]}"
        return None

    def file_tensors(self, model: nn.Module, grafts: Sequence[Graft]) -> dict[str, Tensor]:
        """See `PeftType.file_tensors`."""
        return {
            name: self.as_in_file(graft.delta, own, tensor.detach())
            for graft in own_grafts(grafts)
            for own, tensor in graft.delta.named_parameters()
            for name in [f"{graft.place.module}.{self.names[own]}"]
        }

    def own_tensors(
        self, model: nn.Module, grafts: Sequence[Graft], tensors: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """See `PeftType.own_tensors`."""
        found = dict(tensors)
        for graft in own_grafts(grafts):
            for own, _ in graft.delta.named_parameters():
                tensor = found.pop(f"{graft.place.module}.{self.names[own]}", None)
                if tensor is not None:
                    found[f"{graft.place.key}.{own}"] = self.as_own(graft.delta, own, tensor)
        return found

    def as_in_file(self, delta: Delta, name: str, tensor: Tensor) -> Tensor:
        """Returns a tensor of ours, by our name, as it lies in PEFT's file."""
        return tensor

    def as_own(self, delta: Delta, name: str, tensor: Tensor) -> Tensor:
        """Returns a tensor of PEFT's file, by our name, as a delta has it."""
        return tensor


class LycorisType(FactorsType):
    """LOHA or LOKR: ranks and alphas by module, dropout of dW, and a core for convolutions."""

    kinds = ("linear", "conv")
    defaults: ClassVar[Mapping[str, Any]] = {
        "alpha": 8,
        "alpha_pattern": {},
        "module_dropout": 0.0,
        "r": 8,
        "rank_dropout": 0.0,
        "rank_pattern": {},
        "use_effective_conv2d": False,
    }
    turned: ClassVar[tuple[str, ...]]
    """Tensors that lie the other way round in the file where there is a core."""
    core: ClassVar[str]
    """A core's name."""

    def settings(self, adapter: Adapter) -> dict[str, Any]:
        """See `PeftType.settings`."""
        method, pairs = adapter.method, dict[str, tuple[int, float]]()
        assert isinstance(method, Lycoris)
        for graft in own_grafts(adapter.grafts):
            name, scale = graft.place.module, getattr(graft.delta, "scale", 1.0)
            rank = method.rank_of(name)
            pairs[name] = (rank, whole_number(scale * rank))
        return {
            **rank_settings(method, pairs),
            "module_dropout": method.module_dropout,
            "rank_dropout": method.rank_dropout,
            "use_effective_conv2d": method.tucker,
        }

    def common(
        self, config: Mapping[str, Any], modules: Sequence[str], heads: Sequence[str]
    ) -> dict[str, Any]:
        """Returns the settings of ours that both types have."""
        return {
            "r": config["r"],
            "alpha": config["alpha"],
            "targets": tuple(modules),
            "rank_dropout": config["rank_dropout"],
            "module_dropout": config["module_dropout"],
            "tucker": config["use_effective_conv2d"],
            "rank_pattern": used(config["rank_pattern"], modules),
            "alpha_pattern": used(config["alpha_pattern"], modules),
            "train_head": tuple(heads) or False,
        }

    def as_in_file(self, delta: Delta, name: str, tensor: Tensor) -> Tensor:
        """See `FactorsType.as_in_file`."""
        return tensor.t() if self._is_turned(delta, name) else self._kernel(delta, name, tensor)

    def as_own(self, delta: Delta, name: str, tensor: Tensor) -> Tensor:
        """See `FactorsType.as_own`."""
        own = delta.get_parameter(name)
        if self._is_turned(delta, name):
            return tensor.t() if tensor.ndim == 2 else tensor
        fits = tensor.shape == self._kernel(delta, name, own).shape
        return tensor.reshape(own.shape) if fits else tensor

    def _is_turned(self, delta: Delta, name: str) -> bool:
        return name in self.turned and getattr(delta, self.core) is not None

    def _kernel(self, delta: Delta, name: str, tensor: Tensor) -> Tensor:
        """Returns a tensor that has taps with the dimensions of the file."""
        # PEFT's core of a Conv1d is that of a Conv2d one wide.
        return tensor[..., None] if name.startswith("T") and tensor.ndim == 3 else tensor


def own_grafts(grafts: Sequence[Graft]) -> Iterator[Graft]:
    """Yields the grafts of a method's own deltas, heads left out."""
    return (graft for graft in grafts if not isinstance(graft.delta, OwnValue))


def _unlike(graft: Graft, host: nn.Module) -> str:
    """Returns what kind of place a graft is at, as PEFT tells them apart."""
    if isinstance(graft.place, ParameterPlace):
        return "experts"
    assert isinstance(graft.place, LinearPlace)
    if graft.place.rows is not None:
        return "slice"
    if isinstance(host, nn.Conv3d):
        return "conv3d"
    kind = hosts.kind_of(host)
    return "Conv1D" if kind == "linear" and hosts.is_transposed(host) else kind


_WORDS = {
    "experts": "experts kept as one tensor",
    "slice": "parts of a fused module",
    "conv3d": "3-D convolutions",
    "Conv1D": "transformers' Conv1D",
    "conv": "convolutions",
    "embedding": "embeddings",
    "linear": "linears",
}
