"""Which blocks a `layers` setting means."""

from __future__ import annotations

import re
from collections.abc import Sequence

from graftune.anatomy.parts import Anatomy, Block
from graftune.errors import AnatomyError

_SLICE = re.compile(r"\s*(-?\d*)\s*:\s*(-?\d*)\s*")


def pick_layers(anatomy: Anatomy, layers: int | str | Sequence[int]) -> tuple[Block, ...]:
    """Returns the blocks that `layers` means, counted over all stacks, in order.

    Raises:
        AnatomyError: If an index is out of range, a slice is empty or isn't one.
    """
    count = len(anatomy.blocks)
    if isinstance(layers, str):
        return _slice(anatomy, layers, count)
    wanted = [layers] if isinstance(layers, int) else list(layers)
    if not wanted:
        raise AnatomyError("layers is an empty list: leave it out to mean every layer.")
    for layer in wanted:
        if isinstance(layer, bool) or not isinstance(layer, int) or not -count <= layer < count:
            raise AnatomyError(_out_of_range(layer, count, anatomy))
    indices = {layer % count for layer in wanted}
    return tuple(block for block in anatomy.blocks if block.index in indices)


def _slice(anatomy: Anatomy, layers: str, count: int) -> tuple[Block, ...]:
    match = _SLICE.fullmatch(layers)
    if match is None:
        raise AnatomyError(
            f'layers {layers!r} isn\'t a slice: write "2:6", or give an index or a list of indices.'
        )
    start, stop = (int(part) if part else None for part in match.groups())
    blocks = anatomy.blocks[start:stop]
    if not blocks:
        raise AnatomyError(f"layers {layers!r} holds none of the model's {count} layers.")
    return blocks


def _out_of_range(layer: object, count: int, anatomy: Anatomy) -> str:
    stacks = ", ".join(
        f"{stack.kind} {stack.blocks[0].index}-{stack.blocks[-1].index}" for stack in anatomy.stacks
    )
    return f"Layer {layer!r} is out of range: this model has {count} layers ({stacks or 'none'})."
