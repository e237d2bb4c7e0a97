"""IA3: HF PEFT scales the output of each targeted module, or the input of the feedforward ones.

Its vectors are of whole modules; a slice of a fused one becomes a vector of ones but for its rows.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from graftune.errors import FormatError
from graftune.formats.peft_common import NO_RULES, short_heads
from graftune.formats.peft_settings import names, targeted_modules
from graftune.formats.peft_types.base import PeftType
from graftune.methods.ia3 import IA3, ScaledExperts, ScaledInput, ScaledOutput
from graftune.sites import hosts
from graftune.sites.base import Graft, LinearPlace, base_modules

if TYPE_CHECKING:
    from graftune.adapter import Adapter


class _Ia3(PeftType):
    """See the module."""

    name = "IA3"
    method = "IA3"
    defaults: ClassVar[Mapping[str, Any]] = {
        "exclude_modules": None,
        "feedforward_modules": None,
        "target_modules": None,
    }
    without_effect = ("fan_in_fan_out", "init_ia3_weights")

    def obstacle(self, adapter: Adapter) -> str | None:
        """See `PeftType.obstacle`."""
        sides: dict[str, str] = {}
        for graft in adapter.grafts:
            place = graft.place
            if isinstance(graft.delta, ScaledExperts):
                return f"HF PEFT's IA3 can't scale the tensor {place.key} of experts"
            if not isinstance(place, LinearPlace):
                continue
            host = adapter.model.get_submodule(place.module)
            if isinstance(host, nn.Embedding | nn.Conv1d):
                return f"HF PEFT's IA3 can't scale {place.module}, of class {type(host).__name__}"
            if sides.setdefault(place.module, place.side) != place.side:
                return f"HF PEFT's IA3 can't scale both the input and the output of {place.module}"
        return None

    def settings(self, adapter: Adapter) -> dict[str, Any]:
        """See `PeftType.settings`."""
        model = adapter.model
        outputs, inputs = (
            {g.place.module: None for g in adapter.grafts if isinstance(g.delta, kind)}
            for kind in (ScaledOutput, ScaledInput)
        )
        fixed = {**NO_RULES, "modules_to_save": short_heads(model, adapter.head_names)}
        rules = _rules(list(outputs), list(inputs), fixed, list(base_modules(model)))
        scaled = [model.get_submodule(module) for module in (*outputs, *inputs)]
        return {
            **rules,
            "exclude_modules": None,
            "fan_in_fan_out": any(hosts.is_transposed(host) for host in scaled),
            "init_ia3_weights": True,
        }

    def method_of(
        self, config: Mapping[str, Any], modules: Sequence[str], heads: Sequence[str]
    ) -> IA3:
        """See `PeftType.method_of`.

        Raises:
            FormatError: the config doesn't say which modules have their inputs scaled.
        """
        given = config["feedforward_modules"]
        if given is None:
            raise FormatError(
                "IA3's feedforward_modules is missing: write into adapter_config.json which of the "
                "target_modules have their inputs scaled, [] for none."
            )
        inputs = tuple(module for module in modules if _is_feedforward(given, module))
        outputs = tuple(module for module in modules if module not in inputs)
        return IA3(targets=outputs, feedforward=inputs, train_head=tuple(heads) or False)

    def file_tensors(self, model: nn.Module, grafts: Sequence[Graft]) -> dict[str, Tensor]:
        """See `PeftType.file_tensors`."""
        found: dict[str, Tensor] = {}
        for graft, key, host in _vectors(model, grafts):
            scales: Tensor = graft.delta.l.detach()
            if (index := _index(graft)) is not None:
                whole = found.get(key, scales.new_ones(hosts.features(host)[1]))
                scales = whole.flatten().index_copy(0, index.to(scales.device), scales)
            found[key] = scales.reshape(_shape(graft, host))
        return found

    def own_tensors(
        self, model: nn.Module, grafts: Sequence[Graft], tensors: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """See `PeftType.own_tensors`."""
        named, used = dict(tensors), set[str]()
        for graft, key, host in _vectors(model, grafts):
            if key in tensors:
                used.add(key)
                named[f"{graft.place.key}.l"] = _cut(
                    tensors[key], _index(graft), _shape(graft, host)
                )
        return {name: tensor for name, tensor in named.items() if name not in used}


def _vectors(model: nn.Module, grafts: Iterable[Graft]) -> Iterable[tuple[Any, str, nn.Module]]:
    """Yields each vector of a linear's with its name in PEFT's file and its host."""
    for graft in grafts:
        if isinstance(graft.delta, ScaledOutput | ScaledInput):
            module = graft.place.module
            yield graft, f"{module}.ia3_l", model.get_submodule(module)


def _cut(whole: Tensor, index: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    """Returns a module's vector, or a slice of it; as it is if it is none, for `fill` to refuse."""
    if whole.ndim != len(shape) or any(
        size not in (-1, given) for size, given in zip(shape, whole.shape, strict=True)
    ):
        return whole
    return whole.flatten() if index is None else whole.flatten()[index]


def _index(graft: Graft) -> Tensor | None:
    """Returns the features of a slice, None where a vector is of a whole module."""
    rows = graft.place.rows if isinstance(graft.place, LinearPlace) else None
    return None if rows is None else hosts.row_index(rows)


def _shape(graft: Graft, host: nn.Module) -> tuple[int, ...]:
    """Returns the shape that PEFT's file has, -1 for the features."""
    if hosts.kind_of(host) == "conv":
        return (1, -1, *[1] * len(host.kernel_size))  # type: ignore[arg-type]
    return (1, -1) if isinstance(graft.delta, ScaledInput) else (-1, 1)


def _is_feedforward(rule: Any, module: str) -> bool:
    """Whether PEFT scales a targeted module's input: names that end so, with no dot before."""
    if isinstance(rule, str):
        return re.fullmatch(rule, module) is not None
    return module.endswith(names(rule)) if rule else False


def _rules(
    outputs: Sequence[str], inputs: Sequence[str], fixed: Mapping[str, Any], known: Sequence[str]
) -> dict[str, Any]:
    """Returns the shortest names that mean these modules and no others, else patterns."""
    wanted = {*outputs, *inputs}
    for parts in (1, 2, 99):
        ends = {".".join(name.split(".")[-parts:]) for name in wanted}
        feed = {".".join(name.split(".")[-parts:]) for name in inputs}
        meant = set(targeted_modules({**fixed, "target_modules": sorted(ends)}, known))
        if meant == wanted and {m for m in wanted if _is_feedforward(feed, m)} == {*inputs}:
            return {"target_modules": sorted(ends), "feedforward_modules": sorted(feed)}
    target, feedforward = (
        "|".join(re.escape(name) for name in sorted(part)) for part in (wanted, inputs)
    )
    return {"target_modules": target, "feedforward_modules": feedforward or []}


TYPE = _Ia3()
