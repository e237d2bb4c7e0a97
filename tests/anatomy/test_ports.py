"""Each sublayer's ports, held against what its model really adds up in a forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import graftune as gt
from graftune.anatomy import table
from graftune.anatomy.ports import Sublayer, find_ports, resolve_sublayers
from graftune.errors import AnatomyError
from tests.families import FAMILIES

KINDS = ("attention", "cross-attention", "ffn")


@dataclass
class Pass(TorchDispatchMode):
    """What one forward pass added up, and what went into and out of each module."""

    sums: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    """Both terms and their sum."""
    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor) and len(args) == 2:
            left, right = args
            if isinstance(right, Tensor) and left.shape == right.shape and left.ndim > 1:
                self.sums.append((left, right, result))
        return result

    def keep(self, path: str) -> Any:
        """Returns a hook that keeps a module's first argument and output."""

        def hook(_: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            self.inputs[path] = next(iter((*args, *kwargs.values())), torch.empty(0))
            self.outputs[path] = output[0] if isinstance(output, tuple) else output

        return hook


def run(family: str, **options: Any) -> tuple[list[Sublayer], Pass]:
    """Returns a tiny model's sublayers, and what a forward pass of it did."""
    kind = FAMILIES[family]
    model, inputs, seen = kind.build(**options), kind.inputs(), Pass()
    for path, module in model.named_modules():
        module.register_forward_hook(seen.keep(path), with_kwargs=True)
    with torch.no_grad(), seen:
        model(**inputs)
    return resolve_sublayers(model, gt.anatomy(model), KINDS), seen  # type: ignore[arg-type]


def same(left: Tensor, right: Tensor, windowed: bool = False) -> bool:
    """Whether two tensors hold the same numbers, however rows, tokens or windows are laid out."""
    left, right = left.flatten(), right.flatten()
    if left.shape != right.shape:
        return False
    return torch.equal(left.sort()[0], right.sort()[0]) if windowed else torch.equal(left, right)


def totals(h: Tensor, seen: Pass, windowed: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields (other term, sum) of each sum that h is a term of, itself or within another sum."""
    for left, right, total in seen.sums:
        for term, other in ((left, right), (right, left)):
            if same(h, term, windowed):
                yield other, total
                yield from totals(total, seen)


OTHERWISE: list[tuple[str, dict[str, Any]]] = [
    ("opt", {"do_layer_norm_before": False}),
    ("gpt_neox", {"use_parallel_residual": False}),
    ("bloom", {"apply_residual_connection_post_layernorm": True}),
]
"""Settings that move a family's norms or sums."""


@pytest.mark.parametrize(("family", "options"), [*((f, {}) for f in FAMILIES), *OTHERWISE])
def test_the_answer_is_what_the_residual_sum_takes(family: str, options: dict[str, Any]) -> None:
    sublayers, seen = run(family, **options)
    assert {s.kind for s in sublayers} >= {"attention", "ffn"}
    for sublayer in sublayers:
        ports = sublayer.ports
        windowed = ports.residual is None
        added = list(totals(seen.outputs[ports.answer], seen, windowed))
        assert added, sublayer.name
        if ports.residual is None:
            assert family in table.WINDOWED
            assert sublayer.kind == "attention"
            continue
        x = seen.inputs[ports.residual]
        sums = [total for other, total in added if same(x, other)]
        assert sums, f"{sublayer.name}: {ports.answer} is not added to what {ports.residual} sees"
        if ports.norm is not None:
            assert any(same(seen.inputs[ports.norm], total) for total in sums), sublayer.name


@pytest.mark.parametrize("family", FAMILIES)
def test_the_sum_goes_on_to_the_next_sublayer_or_out_of_the_block(family: str) -> None:
    sublayers, seen = run(family)
    for sublayer, following in zip(sublayers, [*sublayers[1:], None], strict=True):
        ports = sublayer.ports
        windowed = ports.residual is None
        added = totals(seen.outputs[ports.answer], seen, windowed)
        sums = [seen.outputs[ports.norm]] if ports.norm else [total for _, total in added]
        goals = [seen.outputs[sublayer.block.path]]
        if following is not None and following.ports.residual is not None:
            goals.append(seen.inputs[following.ports.residual])
        assert any(same(goal, total) for goal in goals for total in sums), sublayer.name


@pytest.mark.parametrize("family", FAMILIES)
def test_the_input_is_what_the_norm_before_answers_or_what_is_added_to(family: str) -> None:
    sublayers, seen = run(family)
    for sublayer in sublayers:
        ports = sublayer.ports
        saw = seen.inputs[ports.input]
        assert saw.shape[-1] == sublayer.block.width
        if ports.norm is not None:
            assert ports.residual == ports.input
        elif ports.residual is not None:
            assert same(saw, seen.outputs[ports.residual]), sublayer.name


@pytest.mark.parametrize("family", ["bert", "t5", "gemma2", "mixtral", "opt"])
def test_each_block_has_its_own_ports(family: str) -> None:
    sublayers, _ = run(family)
    for port in ("answer", "input", "residual"):
        paths = [getattr(s.ports, port) for s in sublayers]
        assert len(set(paths)) == len(paths)
        at_home = zip(paths, sublayers, strict=True)
        assert all(path.startswith(f"{s.block.path}.") for path, s in at_home)


@pytest.mark.parametrize(
    ("family", "kind", "answer"),
    [
        ("bert", "attention", "bert.encoder.layer.0.attention.output.dropout"),
        ("bert", "ffn", "bert.encoder.layer.0.output.dropout"),
        ("t5", "ffn", "encoder.block.0.layer.1.dropout"),
        ("vit", "attention", "vit.layers.0.attention"),  # its dropout serves both sublayers
        ("vit", "ffn", "vit.layers.0.mlp"),
        ("swin", "ffn", "swin.encoder.layers.0.blocks.0.mlp"),
        ("gpt2", "ffn", "transformer.h.0.mlp"),  # its dropout lies within
        ("distilbert", "ffn", "distilbert.transformer.layer.0.ffn"),
        ("distilbert", "attention", "distilbert.transformer.layer.0.attention"),
    ],
)
def test_only_a_dropout_of_the_sublayers_own_is_its_answer(
    family: str, kind: str, answer: str
) -> None:
    sublayers, _ = run(family)
    assert next(s for s in sublayers if s.kind == kind).ports.answer == answer


@pytest.mark.parametrize("family", ["vit", "swin", "bert", "t5", "gpt2", "distilbert"])
def test_an_answers_module_runs_once_a_pass(family: str) -> None:
    kind = FAMILIES[family]
    model = kind.build(dropout=0.1)
    sublayers = resolve_sublayers(model, gt.anatomy(model), KINDS)  # type: ignore[arg-type]
    runs: list[str] = []
    for sublayer in sublayers:
        host = model.get_submodule(sublayer.ports.answer)
        host.register_forward_hook(lambda *_, name=sublayer.name: runs.append(name))
    model.train()(**kind.inputs())
    assert sorted(runs) == sorted(s.name for s in sublayers)


def test_blocks_and_kinds_can_be_picked() -> None:
    model = FAMILIES["t5"].build()
    parts = gt.anatomy(model)
    assert [s.name for s in resolve_sublayers(model, parts, ["cross-attention"])] == [
        f"decoder.block.{i}.cross-attention" for i in range(2)
    ]
    assert [s.name for s in resolve_sublayers(model, parts, ["ffn"], "1:3")] == [
        "encoder.block.1.ffn",
        "decoder.block.0.ffn",
    ]
    with pytest.raises(AnatomyError, match=r"None of the 2 blocks .* has cross-attention"):
        resolve_sublayers(model, parts, ["cross-attention"], "0:2")


def test_ports_are_found_of_one_span() -> None:
    model = FAMILIES["opt"].build()
    parts = gt.anatomy(model)
    block = parts.blocks[1]
    ports = find_ports(dict(model.named_modules()), parts, block, block.spans[1])
    at = "model.decoder.layers.1"
    assert (ports.answer, ports.input) == (f"{at}.fc2", f"{at}.fc1")
    assert (ports.residual, ports.norm) == (f"{at}.final_layer_norm", None)
