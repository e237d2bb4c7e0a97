"""Names of tensors in AdapterHub's files, and the places of a model that they mean.

    bert.encoder.layer.0.attention.output.adapters.task.adapter_down.0.weight
    [prefix      stack][block][ rest     ]        [name][ tensor            ]

Module names of today's transformers differ from those in the files (ViT), so a place is found by
its stack, the number of its block, and the words that the rest is made of.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from graftune.anatomy import Anatomy
from graftune.anatomy.names import ATTENTION, CROSS, FEED_FORWARD, roles_of
from graftune.anatomy.parts import Block, Projection, Span, Stack
from graftune.errors import BaseMismatchError, FormatError
from graftune.formats.tensors import listed

_HOLDERS = (
    *("adapters", "attention_text_task_adapters", "attention_text_lang_adapters"),
    *("layer_text_task_adapters", "layer_text_lang_adapters"),
    *("loras", "refts", "adapter_fusion_layer"),
)
"""What tensors of an adapter hang below; all but the first and the last three are old names."""
_NAME = re.compile(
    rf"(?P<module>.+?)\.(?P<holder>{'|'.join(_HOLDERS)})\.(?P<name>[^.]+)\.(?P<tensor>.+)"
)
_SHARED = re.compile(r"(?:.+\.)?shared_parameters\.(?P<name>[^.]+)\.(?P<tensor>.+)")
_BLOCK = re.compile(r"(?P<stack>.+?)\.(?P<index>\d+)\.(?P<rest>.+)")
_NUMBERED = re.compile(r"layer\.(\d+)(\.|$)")


@dataclasses.dataclass(frozen=True)
class Named:
    """One tensor of a file and the place that its name means."""

    key: str
    """Its name in the file."""
    block: Block
    rest: str
    """Path of the module that it hangs on, below the block."""
    tensor: str
    """Its name below the adapter's: "adapter_up.bias", "lora_A"."""
    value: Tensor


@dataclasses.dataclass(frozen=True)
class Tensors:
    """The tensors of an adapter's file, sorted."""

    named: tuple[Named, ...]
    shared: Mapping[str, Tensor]
    """Those that all places have in common, by their own names."""
    strangers: Mapping[str, Tensor]
    """Those whose names mean nothing known."""


def sort(
    tensors: Mapping[str, Tensor], anatomy: Anatomy, name: str, where: str, base: str
) -> Tensors:
    """Returns a file's tensors by place.

    Args:
        tensors: by the names in the file.
        anatomy: the model's.
        name: the adapter's, in the file.
        where: the directory, for messages.
        base: the model that the file is for, for messages.

    Raises:
        BaseMismatchError: there are tensors of blocks that the model doesn't have.
    """
    found, absent = list[Named](), list[str]()
    shared, strangers = dict[str, Tensor](), dict[str, Tensor]()
    for key, value in sorted(tensors.items()):
        if ".pool." in key:  # copies that the library writes once more for every block
            continue
        common, parts = _SHARED.fullmatch(key), _NAME.fullmatch(key)
        if common and common["name"] == name:
            shared[common["tensor"]] = value
        elif parts and parts["name"] == name and (at := _BLOCK.fullmatch(parts["module"])):
            block = _block(anatomy, at["stack"], int(at["index"]))
            if block is None:
                absent.append(key)
            else:
                found.append(Named(key, block, at["rest"], parts["tensor"], value))
        else:
            strangers[key] = value
    if absent:
        raise BaseMismatchError(
            f"{where} was made for {base}, which this {anatomy.model_type} is not: "
            f"{len(absent)} tensors belong to blocks that it doesn't have: {listed(absent)}."
        )
    return Tensors(tuple(found), shared, strangers)


def check_even(
    tensors: Tensors, anatomy: Anatomy, left_out: Iterable[int], where: str, base: str
) -> None:
    """Raises unless every block of a stack that isn't left out has the same tensors.

    Raises:
        BaseMismatchError: blocks have none: the model is deeper than the file's.
        FormatError: single tensors are missing.
    """
    out = set(left_out)
    for stack in anatomy.stacks:
        blocks = [block for block in stack.blocks if block.index not in out]
        inside = {id(block): dict[str, Named]() for block in blocks}
        for named in tensors.named:
            if id(named.block) in inside:
                inside[id(named.block)][f"{named.rest}.{named.tensor}"] = named
        empty = [block.index for block in blocks if not inside[id(block)]]
        if empty:
            raise BaseMismatchError(
                f"{where} was made for {base}, which this {anatomy.model_type} is not: it has "
                f"nothing for block {empty[0]}"
                + (f" and {len(empty) - 1} more" if len(empty) > 1 else "")
                + f" of {len(anatomy.blocks)}."
            )
        every = {name for names in inside.values() for name in names}
        missing = [
            f"{block.path}.{name}"
            for block in blocks
            for name in sorted(every - inside[id(block)].keys())
        ]
        if missing:
            raise FormatError(f"{where}: {len(missing)} tensors are missing: {listed(missing)}.")


def block_at(anatomy: Anatomy, module: str) -> tuple[Block, str] | None:
    """Returns the block that a file's name of a module is in, and the rest of the name."""
    at = _BLOCK.fullmatch(module)
    block = None if at is None else _block(anatomy, at["stack"], int(at["index"]))
    return None if at is None or block is None else (block, at["rest"])


def span_of(block: Block, rest: str) -> Span | None:
    """Returns the sublayer that a path below a block belongs to; None if it has no such one.

    Example: "attention.output", "output_adapters", "layer.1" (T5's second), "mlp.down_proj".
    """
    numbered = _NUMBERED.match(rest)
    if numbered:
        index = int(numbered[1])
        return block.spans[index] if index < len(block.spans) else None
    kind = "ffn"
    if CROSS.search(rest):
        kind = "cross-attention"
    elif "attention" in rest or "attn" in rest:
        kind = "attention"
    return next((span for span in block.spans if span.kind == kind), None)


def projections(modules: Mapping[str, nn.Module], block: Block, rest: str) -> list[Projection]:
    """Returns the roles of a linear by its path below a block, in the order in which it has them.

    The model may have the module by that path or, under another name, one of the same role.
    """
    path = f"{block.path}.{rest}"
    every = [part for span in block.spans for part in span.projections]
    if path in modules:
        return [part for part in every if part.module == path]
    span = span_of(block, rest)
    roles = _roles(rest, span)
    return [] if span is None else [part for part in span.projections if part.role in roles]


def _roles(rest: str, span: Span | None) -> tuple[str, ...]:
    parts = rest.split(".")
    if span is None:
        return ()
    if span.kind != "ffn":
        return roles_of(parts[-1], ATTENTION) or ("output",)
    if "intermediate" in parts:
        return ("up",)
    return ("down",) if "output" in parts else roles_of(parts[-1], FEED_FORWARD)


def _block(anatomy: Anatomy, path: str, index: int) -> Block | None:
    stack = _stack(anatomy, path)
    blocks = () if stack is None else stack.blocks
    return blocks[index] if index < len(blocks) else None


def _stack(anatomy: Anatomy, path: str) -> Stack | None:
    """Returns the stack of a path: by its name, the only one, or the one whose kind it holds."""
    exact = [s for s in anatomy.stacks if _is_same(s.path, path)]
    if len(exact) == 1:
        return exact[0]
    if len(anatomy.stacks) == 1:
        return anatomy.stacks[0]
    by_kind = [s for s in anatomy.stacks if s.kind in path]
    return by_kind[-1] if len(by_kind) == 1 else None


def _is_same(one: str, other: str) -> bool:
    """Whether two paths are one but for what stands before."""
    return one == other or one.endswith("." + other) or other.endswith("." + one)
