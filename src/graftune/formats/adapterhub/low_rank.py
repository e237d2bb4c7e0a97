"""What AdapterHub's kinds that hang on linears have in common: LoRA, (IA)^3, VeRA.

Which linears they are is told by their tensors, and held against the settings: attn_matrices of
attention, intermediate_lora and output_lora of the feed-forward (whichever of its two a model's
class gave that name, LLaMA's the other way round).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence

from torch import Tensor, nn

from graftune.anatomy import resolve
from graftune.anatomy.modules import is_in
from graftune.anatomy.parts import Projection
from graftune.errors import AnatomyError, BaseMismatchError, FormatError
from graftune.formats.adapterhub.base import Kind, Reading
from graftune.formats.adapterhub.names import projections
from graftune.formats.tensors import listed
from graftune.methods._gate import add_gates
from graftune.sites import hosts
from graftune.sites.base import Graft, base_modules

GATE = ("gate.weight", "gate.bias")
"""Tensors of a gate."""
_LETTERS = {"q": "query", "k": "key", "v": "value"}
"""What attn_matrices may hold; others have no effect."""


@dataclasses.dataclass(frozen=True)
class Linear:
    """One linear, or one slice of a fused one, with its share of the file's tensors."""

    projection: Projection
    """Of role "other" where the model's anatomy knows none."""
    host: nn.Module
    tensors: Mapping[str, Tensor]
    """By their own names: "lora_A", "lora_B", "m.weight"."""
    key: str
    """What the names in the file begin with."""

    @property
    def module(self) -> str:
        """Path of the module."""
        return self.projection.module

    @property
    def sizes(self) -> tuple[int, int]:
        """Features that go in, and those of its outputs that are its own."""
        fan_in, out = hosts.features(self.host)
        rows = self.projection.rows
        return fan_in, out if rows is None else sum(stop - start for start, stop in rows)


class LowRankKind(Kind):
    """See the module."""

    holder = "loras"
    defaults = {  # noqa: RUF012
        "alpha": 8,
        "attn_matrices": ["q", "v"],
        "composition_mode": "add",
        "dropout": 0.0,
        "intermediate_lora": False,
        "output_lora": False,
        "r": 8,
        "selfattn_lora": True,
        "use_dora": False,
        "use_gating": False,
        "vera_b": None,
        "vera_d": None,
    }
    without_effect = ("dtype", "init_weights", "init_weights_seed")


def linears(reading: Reading, wanted: Collection[str]) -> list[Linear]:
    """Returns every linear that a file changes, block by block.

    Args:
        reading: the directory.
        wanted: the names of the tensors that each has, but for gates.

    Raises:
        FormatError: tensors are missing or unexpected.
        BaseMismatchError: the model has no such linears.
    """
    wanted = (*wanted, *(GATE if reading.config["use_gating"] else ()))
    groups: dict[tuple[int, str], dict[str, Tensor]] = {}
    keys: dict[tuple[int, str], str] = {}
    strange = list(reading.tensors.strangers)
    for named in reading.tensors.named:
        at = named.block.index, named.rest
        keys[at] = named.key.removesuffix(named.tensor)
        groups.setdefault(at, {})[named.tensor] = named.value
        if named.tensor not in wanted:
            strange.append(named.key)
    missing = [keys[at] + n for at, own in groups.items() for n in wanted if n not in own]
    _check_names(reading, missing, strange)
    modules = base_modules(reading.model)
    found = [
        linear
        for at, own in sorted(groups.items(), key=lambda group: group[0][0])
        for linear in _parts(reading, modules, at, own, keys[at])
    ]
    _check_settings(reading, found)
    return found


def gate_kind(reading: Reading) -> str | None:
    """Returns the kind of gate that the settings mean: a mean over all tokens, or none."""
    return "mean-padded" if reading.config["use_gating"] else None


def fill_gates(reading: Reading, grafts: Sequence[Graft], found: Sequence[Linear]) -> None:
    """Gives the deltas of gated linears the gates that the file has."""
    kind = gate_kind(reading)
    if kind is None:
        return
    add_gates(kind, grafts, reading.anatomy, empty=True)
    for graft, linear in zip(grafts, found, strict=True):
        check_shape(reading, linear, "gate.weight", (1, linear.sizes[0]))
        check_shape(reading, linear, "gate.bias", (1,))
        for name, tensor in graft.delta.state_dict(keep_vars=True).items():
            if name in GATE:
                tensor.data.copy_(linear.tensors[name])


def _check_names(reading: Reading, missing: list[str], strange: list[str]) -> None:
    problems = [f"{len(missing)} missing: {listed(missing)}"] if missing else []
    problems += [f"{len(strange)} unexpected: {listed(strange)}"] if strange else []
    if problems:
        raise FormatError(
            f"{reading.where}: its tensors don't fit its settings: {'; '.join(problems)}."
        )


def targets(reading: Reading, found: Sequence[Linear]) -> tuple[str, ...]:
    """Returns the shortest `targets` that mean the linears: roles, else modules' names."""
    roles = tuple(dict.fromkeys(linear.projection.role for linear in found))
    meant = {(linear.module, linear.projection.rows) for linear in found}
    try:
        chosen = resolve(reading.model, reading.anatomy, roles, reading.layers)
    except AnatomyError:
        chosen = ()
    if meant == {(part.module, part.rows) for part in chosen}:
        return roles
    whole = {linear.module for linear in found}
    if whole == {part.module for part in chosen}:  # each role of a fused linear on its own
        return roles
    return tuple(dict.fromkeys(linear.module for linear in found))


def check_shape(reading: Reading, linear: Linear, name: str, shape: Sequence[int]) -> None:
    """Raises BaseMismatchError if a tensor isn't of the shape that the model needs."""
    given = tuple(linear.tensors[name].shape)
    if given != tuple(shape):
        raise BaseMismatchError(
            f'{reading.where} was made for another base: "{linear.key}{name}" is {given}, this '
            f"model needs {tuple(shape)}."
        )


def _parts(
    reading: Reading,
    modules: Mapping[str, nn.Module],
    at: tuple[int, str],
    own: Mapping[str, Tensor],
    key: str,
) -> Iterator[Linear]:
    """Yields a linear; of a fused one each role that the settings name, with its share."""
    block = reading.anatomy.blocks[at[0]]
    parts = projections(modules, block, at[1])
    path = parts[0].module if parts else f"{block.path}.{at[1]}"
    if path not in modules:
        raise BaseMismatchError(
            f"{reading.where} was made for another base: it changes {at[1]} of block {at[0]}, "
            f"which this {type(reading.model).__name__} has not."
        )
    if not parts or not parts[0].is_fused:
        yield Linear(parts[0] if parts else Projection("other", path), modules[path], own, key)
        return
    roles = [_LETTERS[word] for word in reading.config["attn_matrices"] if word in _LETTERS]
    chosen = [part for part in parts if part.role in roles]
    for index, part in enumerate(chosen):
        yield Linear(part, modules[path], _share(reading, own, index, len(chosen), key), key)


def _share(
    reading: Reading, own: Mapping[str, Tensor], index: int, of: int, key: str
) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, tensor in own.items():
        if tensor.ndim == 0 or tensor.shape[0] % of:
            raise BaseMismatchError(
                f'{reading.where}: "{key}{name}" is {tuple(tensor.shape)}, which is not {of} '
                "matrices in one."
            )
        size = tensor.shape[0] // of
        found[name] = tensor[index * size : (index + 1) * size]
    return found


def _check_settings(reading: Reading, found: Sequence[Linear]) -> None:
    """Raises FormatError if the linears aren't those that the settings name."""
    config = reading.config
    letters = config["attn_matrices"] if config["selfattn_lora"] else ()
    asked = {_LETTERS[word] for word in letters if word in _LETTERS}
    roles = {linear.projection.role for linear in found}
    attention = roles & {*_LETTERS.values()}
    first = reading.tensors.named[0].block.path
    feed = {
        n.module for n in found if n.projection.role not in attention and is_in(n.module, (first,))
    }
    number = bool(config["intermediate_lora"]) + bool(config["output_lora"])
    if attention != asked or len(feed) != number:
        raise FormatError(
            f"{reading.where}: its settings ask for {', '.join(sorted(asked)) or 'no'} matrices of "
            f"attention and {number} of each feed-forward; its tensors are of "
            f"{', '.join(sorted(roles))}."
        )
