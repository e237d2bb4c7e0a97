"""A LoRA directory of HF PEFT, or of ours, as grafts for a model: strict, and touching nothing.

What the settings ask for on this model and what the file holds must be the same tensors, each of
the shape that the model needs. Grafts are built from the file's tensors, so nothing is initialised.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from graftune.anatomy import Anatomy
from graftune.anatomy.modules import is_in
from graftune.errors import BaseMismatchError, FormatError
from graftune.formats import factors as forms
from graftune.formats import peft_settings as rules
from graftune.formats.base import base_name, embeddings
from graftune.formats.factors import Factors, Slice
from graftune.formats.peft_ranks import used
from graftune.formats.tensors import listed
from graftune.methods._lora_starts import start_from_weight
from graftune.methods._lora_tokens import token_grafts
from graftune.methods._low_rank import LowRank, TokenRows
from graftune.methods._patterns import value_for
from graftune.methods.lora import LoRA
from graftune.sites import hosts
from graftune.sites.base import Graft, is_base
from graftune.sites.parameter import OwnValue, own_value

_SUFFIXES = (
    *("lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_embedding_A", "lora_embedding_B"),
    *("lora_magnitude_vector", "token_adapter.trainable_tokens_delta"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """One directory's content and the model it is read for."""

    where: str
    """The directory, for errors."""
    model: nn.Module
    modules: Mapping[str, nn.Module]
    """The model's own, by path."""
    config: Mapping[str, Any]
    """Checked, every key filled in."""
    tensors: Mapping[str, Tensor]
    """By name, without PEFT's prefix."""
    method: LoRA
    slices: Mapping[str, Sequence[Slice]]
    """Of our own directories: the slices that a module's change was put together from."""
    own: bool
    """Whether graftune wrote it."""
    heads: tuple[str, ...]
    """Modules saved whole."""
    values: Mapping[str, bool] | None = None
    """Of our own directories: the adapter's own values, and whether tied modules follow them."""


def method_of(config: Mapping[str, Any], heads: Sequence[str], modules: Sequence[str]) -> LoRA:
    """Returns PEFT's settings as ours.

    Args:
        config: checked.
        heads: modules saved whole.
        modules: the names of the adapted modules and expert tensors.
    """
    targets = config["target_modules"]
    if not isinstance(targets, str):
        given = (*rules.names(targets), *rules.names(config["target_parameters"]))
        targets = tuple(modules) if config["layers_to_transform"] is not None else given
    tokens = config["trainable_token_indices"]
    init = config["init_lora_weights"]
    excluded = config["exclude_modules"]
    return LoRA(
        r=config["r"],
        alpha=config["lora_alpha"],
        dropout=config["lora_dropout"],
        targets=targets,
        exclude=(excluded,) if isinstance(excluded, str) else rules.names(excluded),
        rslora=config["use_rslora"],
        dora=config["use_dora"],
        init=init if init in ("gaussian", *rules.REDONE_INITS) else "zero-B",
        bias=config["bias"],
        lora_bias=config["lora_bias"],
        rank_pattern=used(config["rank_pattern"], modules),
        alpha_pattern=used(config["alpha_pattern"], modules),
        trainable_tokens=tuple(tokens) if isinstance(tokens, list) else tokens,
        train_head=tuple(heads) or False,
    )


def adapted(modules: Mapping[str, nn.Module], config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns (module, parameter) of all that the settings put a LoRA on, in the model's order."""
    found = [(name, "weight") for name in rules.targeted_modules(config, modules)]
    if config["target_parameters"]:
        every = (f"{path}.{n}" for path, m in modules.items() for n in m._parameters)
        for name in rules.targeted_parameters(config, every):
            module, _, parameter = name.rpartition(".")
            found.append((module, parameter))
    return found


def grafts(reading: Reading, anatomy: Anatomy) -> list[Graft]:
    """Returns all grafts of a directory, heads last.

    Raises:
        BaseMismatchError: the file names modules or sizes that the model doesn't have.
        FormatError: tensors are missing or unexpected; the message lists them.
    """
    places = adapted(reading.modules, reading.config)
    plan = _Plan(reading, places)
    plan.check()
    found = [graft for place in places for graft in plan.low_rank(*place)]
    for module, ids in plan.tokens.items():
        found += _token_rows(reading, anatomy, module, ids)
    values = [
        own_value(reading.model, name, empty=True, adds=not is_in(name, reading.heads))
        for name in plan.values
    ]
    for value in values:
        # PEFT saves a copy of a module: what is tied to the original's tensors doesn't follow.
        in_head = is_in(value.place.module, reading.heads)
        value.delta.shared = (reading.values or {}).get(value.place.key, not in_head)
    return found + values


class _Plan:
    """Which tensors of the file go where."""

    def __init__(self, reading: Reading, places: Sequence[tuple[str, str]]) -> None:
        self.reading, self.places = reading, places
        self.modules = {m for m, p in places if p == "weight"}
        self.tokens = _token_modules(reading)
        self.names = {place: self._names_of(*place) for place in places}
        self.others = [n for n in reading.tensors if not n.endswith(_SUFFIXES)]
        self.embeddings = _embedding_paths(reading)
        self.values = self._values()

    def check(self) -> None:
        """Compares the file with what is expected of it."""
        reading, given = self.reading, set(self.reading.tensors)
        wanted = {name: shape for names in self.names.values() for name, shape in names.items()}
        strangers = sorted(given - wanted.keys() - self.accepted)
        _refuse_other_base(reading, strangers)
        missing = sorted((wanted.keys() | self.required) - given)
        problems = [f"{len(missing)} missing: {listed(missing)}"] if missing else []
        if strangers:
            problems.append(f"{len(strangers)} unexpected: {listed(strangers)}")
        if problems:
            base = reading.config["base_model_name_or_path"]
            raise FormatError(
                f"{reading.where}: tensors and settings don't agree for this "
                f"{type(reading.model).__name__}: {'; '.join(problems)}"
                + (f' (the adapter names "{base}" as its base).' if base else ".")
            )
        self._check_shapes(wanted)

    def low_rank(self, module: str, parameter: str) -> list[Graft]:
        """Returns the grafts of one adapted tensor."""
        reading, host = self.reading, self.reading.model.get_submodule(module)
        names = list(self.names[module, parameter])
        tensors = [reading.tensors[name] for name in names]
        name = module if parameter == "weight" else f"{module}.{parameter}"
        A, B = tensors[0], tensors[1]
        if parameter != "weight":
            A, B = forms.expert_factors(A, B, getattr(host, parameter).shape[0])
        extra = dict(zip(names[2:], tensors[2:], strict=True))
        factors = Factors(
            module=module,
            parameter=parameter,
            A=A,
            B=B,
            scale=self._scale(name, A.shape[0 if parameter == "weight" else 1]),
            bias=next((t for n, t in extra.items() if n.endswith("lora_B.bias")), None),
            magnitude=next((t for n, t in extra.items() if "magnitude" in n), None),
        )
        method = reading.method
        from_start = method.init in rules.REDONE_INITS
        if from_start and not reading.own:
            factors = _with_start(host, factors, method.init)
        pieces = forms.cut(factors, reading.slices.get(name, ()))
        return [
            forms.graft(host, piece, part, dropout=method.dropout, from_start=from_start)
            for part, piece in pieces
        ]

    def _scale(self, name: str, rank: int) -> float:
        if self.reading.own:
            return self.reading.method.scale(name)
        alpha = value_for(
            self.reading.config["alpha_pattern"], name, self.reading.config["lora_alpha"]
        )
        return alpha / (math.sqrt(rank) if self.reading.config["use_rslora"] else rank)

    def _names_of(self, module: str, parameter: str) -> dict[str, tuple[int, ...]]:
        reading, config = self.reading, self.reading.config
        host = reading.model.get_submodule(module)
        name = module if parameter == "weight" else f"{module}.{parameter}"
        r = value_for(config["rank_pattern"], name, config["r"])
        tensor = getattr(host, parameter, None)
        if not isinstance(tensor, Tensor) or (tensor.ndim != 3 and parameter != "weight"):
            raise FormatError(
                f"{reading.where}: LoRA on {name}, of a {type(host).__name__}, isn't supported."
            )
        if parameter != "weight":
            return self._names_in_experts(module, parameter, host, r)
        kind = hosts.kind_of(host)
        if kind == "linear" and not (hosts.is_transposed(host) or hasattr(host, "in_features")):
            raise FormatError(
                f"{reading.where}: LoRA on {name}, of a {type(host).__name__}, isn't supported."
            )
        fan_in, out = hosts.features(host)
        taps = tuple(getattr(host, "kernel_size", ()))
        ones = (1,) * len(taps)
        form = "lora_embedding_{}" if kind == "embedding" else "lora_{}.weight"
        names: dict[str, tuple[int, ...]] = {
            f"{module}.{form.format('A')}": (r, fan_in, *taps),
            f"{module}.{form.format('B')}": (out, r, *ones),
        }
        if config["lora_bias"]:
            names[f"{module}.lora_B.bias"] = (out,)
        if config["use_dora"]:
            names[f"{module}.lora_magnitude_vector"] = (1, out, *ones) if taps else (out,)
        return names

    def _names_in_experts(
        self, module: str, parameter: str, host: nn.Module, r: int
    ) -> dict[str, tuple[int, ...]]:
        experts, out, fan_in = hosts.expert_sizes(host, parameter)
        order = [name for name, _ in host.named_parameters(recurse=False)]
        chosen = [p for m, p in self.places if m == module]
        depth = sum(order.index(p) > order.index(parameter) for p in chosen)
        at = f"{module}.{'base_layer.' * depth}"
        return {
            f"{at}lora_A.weight": (r * experts, fan_in),
            f"{at}lora_B.weight": (out, r * experts),
        }

    @property
    def accepted(self) -> set[str]:
        """Names that may be in the file beside the low-rank tensors."""
        keys = {self._file_name(name) for name in self.values} | self._same_as_base()
        return keys | {f"{m}.token_adapter.trainable_tokens_delta" for m in self.tokens}

    @property
    def required(self) -> set[str]:
        """Names that must be in the file beside the low-rank tensors."""
        reading, config, model = self.reading, self.reading.config, self.reading.model
        names = {f"{m}.token_adapter.trainable_tokens_delta" for m in self.tokens}
        if reading.values is not None:
            return names | {self._file_name(name) for name in reading.values}
        names |= {
            f"{head}.{name}"
            for head in reading.heads
            for name, _ in model.get_submodule(head).named_parameters()
            if is_base(name)
        }
        if config["bias"] == "lora_only":
            hosts_of = {module: model.get_submodule(module) for module in self.modules}
            names |= {
                f"{module}.base_layer.bias"
                for module, host in hosts_of.items()
                if host._parameters.get("bias") is not None
            }
        return names

    def _file_name(self, name: str) -> str:
        """Returns the name in the file of one of the base's own tensors."""
        module, _, parameter = name.rpartition(".")
        return f"{module}.base_layer.{parameter}" if module in self.modules else name

    def _values(self) -> list[str]:
        """Returns the base's tensors of which the file holds other values, by their names there."""
        reading, found = self.reading, []
        for name in self.others:
            module, _, parameter = name.rpartition(".")
            wrapped = module.endswith(".base_layer")
            module = module.removesuffix(".base_layer")
            base = _base_tensor(reading, module, parameter)
            if base is not None and wrapped == (module in self.modules):
                own = f"{module}.{parameter}" if module else parameter
                if self._has_own(own, module, base, reading.tensors[name]):
                    found.append(own)
        return found

    def _has_own(self, own: str, module: str, base: Tensor, tensor: Tensor) -> bool:
        """Whether the adapter has a value of its own of one of the base's tensors."""
        reading = self.reading
        if reading.values is not None:
            return own in reading.values
        if is_in(own, reading.heads):
            return True
        if reading.config["bias"] != "none" and "bias" in own:
            return True
        return own == f"{module}.weight" and module in self.embeddings and not _same(base, tensor)

    def _same_as_base(self) -> set[str]:
        """Returns names of tensors that add nothing: the base's own, a head's other names."""
        reading, found = self.reading, set[str]()
        for name in self.others:
            module, _, parameter = name.rpartition(".")
            module = module.removesuffix(".base_layer")
            host = reading.modules.get(module)
            if host is None:
                continue
            in_head = is_in(module, reading.heads)
            base = host._parameters.get(parameter) if module in self.embeddings else None
            if base is None and in_head:
                base = host._buffers.get(parameter)
            repeated = reading.values is not None and in_head
            if repeated or (base is not None and _same(base, reading.tensors[name])):
                found.add(name)
        return found

    def _check_shapes(self, wanted: Mapping[str, tuple[int, ...]]) -> None:
        reading = self.reading
        shapes = dict(wanted)
        for name in self.values:
            module, _, parameter = name.rpartition(".")
            base = _base_tensor(reading, module, parameter)
            assert base is not None
            shapes[self._file_name(name)] = tuple(base.shape)
        for module, ids in self.tokens.items():
            width = hosts.features(reading.model.get_submodule(module))[1]
            shapes[f"{module}.token_adapter.trainable_tokens_delta"] = (len(ids), width)
        wrong = [
            f'"{name}" is {tuple(reading.tensors[name].shape)}, this model needs {shape}'
            for name, shape in shapes.items()
            if tuple(reading.tensors[name].shape) != shape
        ]
        if wrong:
            raise _other_base(reading, f"{len(wrong)} tensors have another shape: {wrong[0]}")


def fill(grafts: Sequence[Graft], reading: Reading) -> None:
    """Copies the file's values of the base's own tensors into grafts that were left empty."""
    for graft in grafts:
        if isinstance(graft.delta, OwnValue):
            place = graft.place
            names = (place.key, f"{place.module}.base_layer.{place.parameter}")
            value = next(reading.tensors[name] for name in names if name in reading.tensors)
            graft.delta.value.data.copy_(value)


def _with_start(host: nn.Module, factors: Factors, init: str) -> Factors:
    """Adds the start that PEFT took out of the base: computed again from the base's weight."""
    A, B = (
        factors.A.new_empty(factors.A.shape).float(),
        factors.B.new_empty(factors.B.shape).float(),
    )
    delta = LowRank(A, B, factors.scale, 0.0, False)
    with torch.no_grad():
        start_from_weight(init, delta, hosts.read(host).detach())
    assert delta.A0 is not None
    assert delta.B0 is not None
    return dataclasses.replace(
        factors,
        A=torch.cat([factors.A.float(), delta.A0]),
        B=torch.cat([factors.B.float(), -delta.B0], 1),
    )


def _token_rows(reading: Reading, anatomy: Anatomy, module: str, ids: Sequence[int]) -> list[Graft]:
    found = token_grafts(reading.model, anatomy, module, tuple(ids))
    rows = found[0].delta
    assert isinstance(rows, TokenRows)
    rows.rows.data.copy_(reading.tensors[f"{module}.token_adapter.trainable_tokens_delta"])
    return found


def _token_modules(reading: Reading) -> dict[str, list[int]]:
    """Returns the embeddings of which single tokens are trained, and their ids."""
    tokens, modules = reading.config["trainable_token_indices"], reading.modules
    if not tokens:
        return {}
    if isinstance(tokens, list):
        inputs, _ = embeddings(reading.model)
        found = [name for name, module in modules.items() if module is inputs]
        return {found[0]: tokens} if found else {}
    return {name: ids for end, ids in tokens.items() for name in modules if name.endswith(end)}


def _embedding_paths(reading: Reading) -> set[str]:
    wanted = {id(module) for module in embeddings(reading.model) if module is not None}
    return {name for name, module in reading.modules.items() if id(module) in wanted}


def _base_tensor(reading: Reading, module: str, parameter: str) -> Tensor | None:
    host = reading.modules.get(module)
    return None if host is None else host._parameters.get(parameter)


def _same(base: Tensor, tensor: Tensor) -> bool:
    if base.shape != tensor.shape or base.is_meta:
        return False
    return torch.equal(base.detach().cpu(), tensor.to(base.dtype))


def _refuse_other_base(reading: Reading, strangers: Sequence[str]) -> None:
    """Raises if tensors belong to modules that the model doesn't have."""
    absent = [name for name in strangers if _module_of(name) not in reading.modules]
    if absent:
        raise _other_base(
            reading, f"{len(absent)} tensors belong to modules it doesn't have: {listed(absent)}"
        )


def _module_of(name: str) -> str:
    for suffix in _SUFFIXES:
        if name.endswith(f".{suffix}"):
            return name.removesuffix(f".{suffix}").replace(".base_layer", "")
    return name.rpartition(".")[0].replace(".base_layer", "")


def _other_base(reading: Reading, problem: str) -> BaseMismatchError:
    base = reading.config["base_model_name_or_path"]
    theirs = f'"{base}"' if base else "a model it doesn't name"
    name = base_name(reading.model)
    ours = f"{type(reading.model).__name__}{f' {name!r}' if name else ''}"
    return BaseMismatchError(
        f"{reading.where} was made for {theirs}, which this {ours} is not: {problem}."
    )
