"""Checks an anatomy that the user wrote against the model it is for."""

from __future__ import annotations

from collections.abc import Iterator

from graftune.anatomy.modules import Tree
from graftune.anatomy.parts import Anatomy
from graftune.errors import AnatomyError, nearest


def check_given(given: Anatomy, tree: Tree) -> Anatomy:
    """Returns `given` if every path in it exists.

    Raises:
        AnatomyError: If a module or tensor isn't in the model; names the nearest one.
    """
    for what, path in _modules(given):
        if path not in tree.modules:
            hint = nearest(path, tree.modules)
            raise AnatomyError(f'The given anatomy names {what} "{path}", not in the model.{hint}')
    tensors = {name for name, _ in tree.model.named_parameters(remove_duplicate=False)}
    for name in _tensors(given):
        if name not in tensors:
            hint = nearest(name, tensors)
            raise AnatomyError(
                f'The given anatomy names a tensor "{name}", not in the model.{hint}'
            )
    return given


def _modules(given: Anatomy) -> Iterator[tuple[str, str]]:
    for stack in given.stacks:
        yield "a stack", stack.path
        for block in stack.blocks:
            yield "a block", block.path
            for span in block.spans:
                yield from (("a span", path) for path in [span.module] if path is not None)
                yield from (("a projection", p.module) for p in span.projections)
                yield from (("a norm", path) for path in (*span.norms, *span.inner_norms))
    yield from (("an embedding", path) for path in given.input_embeddings)
    yield from (("an embedding", path) for path in [given.output_embeddings] if path)
    yield from (("a head", path) for path in (*given.heads, *given.new_heads))
    yield from (("a norm", path) for path in given.norms)


def _tensors(given: Anatomy) -> Iterator[str]:
    yield from given.biases
    for group in given.tied:
        yield from group
    for block in given.blocks:
        for span in block.spans:
            yield from (p.path for p in span.projections if p.parameter != "weight")
