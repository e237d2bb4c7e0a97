"""What the words of `targets`, `layers` and `exclude` mean."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from graftune.anatomy import Projection, anatomy, resolve
from graftune.errors import AnatomyError
from tests.families import FAMILIES

FEED_FORWARD = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]


def found(name: str, targets: Any, **more: Any) -> tuple[Projection, ...]:
    model = FAMILIES[name].build(meta=True)
    return resolve(model, anatomy(model), targets, **more)


def paths(projections: tuple[Projection, ...], block: str = "") -> list[str]:
    return [p.path.removeprefix(block).removesuffix(".weight") for p in projections]


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("query", ["self_attn.q_proj"]),
        ("qv", ["self_attn.q_proj", "self_attn.v_proj"]),
        ("attention", [f"self_attn.{x}_proj" for x in "qkvo"]),
        ("self-attention", [f"self_attn.{x}_proj" for x in "qkvo"]),
        ("output", ["self_attn.o_proj"]),
        ("ffn", FEED_FORWARD),
        ("down", ["mlp.down_proj"]),
        (["key", "gate"], ["self_attn.k_proj", "mlp.gate_proj"]),
        (["down", "query"], ["self_attn.q_proj", "mlp.down_proj"]),
        ("blocks", [f"self_attn.{x}_proj" for x in "qkvo"] + FEED_FORWARD),
        ("q_proj", ["self_attn.q_proj"]),
        (["self_attn.q_proj", "up"], ["self_attn.q_proj", "mlp.up_proj"]),
        (r".*layers\.\d\.self_attn\.[qk]_proj", ["self_attn.q_proj", "self_attn.k_proj"]),
    ],
)  # fmt: skip
def test_words_mean_these_linears_of_each_block(word: Any, expected: list[str]) -> None:
    got = found("llama", word)
    assert paths(got) == [f"model.layers.{i}.{path}" for i in range(2) for path in expected]
    assert all(p.rows is None for p in got)


@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_are_the_linears_of_attention_and_feed_forward(name: str) -> None:
    model = FAMILIES[name].build(meta=True)
    parts = anatomy(model)
    expected = {p.path for block in parts.blocks for span in block.spans for p in span.projections}
    got = resolve(model, parts, "blocks")
    assert {p.path for p in got} == expected
    assert len(got) == len(expected)
    assert all(p.rows is None for p in got)
    assert {p.path for p in resolve(model, parts, "all-linear")} >= expected


@pytest.mark.parametrize("name", FAMILIES)
def test_all_linear_leaves_out_heads_and_the_language_model_head(name: str) -> None:
    family = FAMILIES[name]
    for task in family.tasks:
        model = family.build(task, meta=True)
        parts = anatomy(model)
        linears = {
            path
            for path, module in model.named_modules()
            if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
        }
        heads = {p for p in linears for head in parts.heads if f"{p}.".startswith(f"{head}.")}
        expected = linears - heads - {parts.output_embeddings}
        got = {p.module for p in resolve(model, parts, "all-linear") if p.parameter == "weight"}
        assert got == expected


@pytest.mark.parametrize("name", FAMILIES)
def test_order_is_the_module_tree_s(name: str) -> None:
    model = FAMILIES[name].build(meta=True)
    tree = [path for path, _ in model.named_modules()]
    for word in ("blocks", "qv", "all-linear", ["down", "query"]):
        places = [tree.index(p.module) for p in resolve(model, anatomy(model), word)]
        assert places == sorted(places)


def test_some_roles_of_a_fused_module_are_slices() -> None:
    query, value = found("gpt2", "qv", layers=0)
    assert (query.role, query.rows, query.layout) == ("query", ((0, 32),), "contiguous")
    assert (value.role, value.rows) == ("value", ((64, 96),))
    assert query.module == value.module == "transformer.h.0.attn.c_attn"


@pytest.mark.parametrize("words", [["query", "key", "value"], "c_attn", ["qv", "attn.c_attn"]])
def test_all_roles_of_a_fused_module_are_one_whole_projection(words: Any) -> None:
    [whole] = found("gpt2", words, layers=0)
    assert whole == Projection("query", "transformer.h.0.attn.c_attn")


def test_gate_and_up_together_are_the_whole_module() -> None:
    [both] = found("phi3", ["gate", "up"], layers=0)
    assert both == Projection("up", "model.layers.0.mlp.gate_up_proj")


def test_excluding_a_role_of_a_fused_module_leaves_slices() -> None:
    got = found("gpt2", "attention", layers=0, exclude="key")
    assert [(p.role, p.rows is None) for p in got] == [
        ("query", False),
        ("value", False),
        ("output", True),
    ]


def test_experts_are_targets_by_role_and_by_the_name_of_their_tensor() -> None:
    [gate, up] = found("mixtral", "up", layers=0) + found("mixtral", "gate", layers=0)
    assert gate.path == up.path == "model.layers.0.mlp.experts.gate_up_proj"
    for word in ("mlp.experts.gate_up_proj", "gate_up_proj", r".*\.gate_up_proj"):
        [whole] = found("mixtral", word, layers=0)
        assert whole == Projection("up", "model.layers.0.mlp.experts", "gate_up_proj")
    assert "router" not in str(found("mixtral", "all-linear"))


def test_cross_attention_is_part_of_attention() -> None:
    both, cross = found("t5", "attention"), found("t5", "cross-attention")
    only = found("t5", "self-attention")
    assert len(both) == 24
    assert paths(cross, "decoder.block.0.layer.1.EncDecAttention.")[:4] == ["q", "k", "v", "o"]
    assert set(both) == set(cross) | set(only)


def test_embeddings_and_convolutions_can_be_named() -> None:
    assert paths(found("bert", "embeddings")) == ["bert.embeddings.word_embeddings"]
    assert paths(found("vit", "projection")) == ["vit.embeddings.patch_embeddings.projection"]
    assert paths(found("llama", "lm_head")) == ["lm_head"]
    assert {p.role for p in found("bert", ["embeddings", "pooler.dense"])} == {"other"}


@pytest.mark.parametrize(
    ("layers", "blocks"),
    [(0, [0]), (-1, [3]), ([0, -1], [0, 3]), ("1:3", [1, 2]), (":2", [0, 1]), ("-1:", [3])],
)
def test_layers_are_counted_over_all_stacks(layers: Any, blocks: list[int]) -> None:
    stems = ["encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"]
    got = found("t5", "down", layers=layers)
    assert [p.module.rsplit(".layer.")[0] for p in got] == [stems[i] for i in blocks]


def test_layers_leave_out_what_is_in_no_block() -> None:
    assert all("layer.1." in path for path in paths(found("bert", "all-linear", layers=1)))


@pytest.mark.parametrize("exclude", ["v_proj", ["value"], r".*v_proj", "value"])
def test_exclude_is_written_like_targets(exclude: Any) -> None:
    assert {p.role for p in found("llama", "qv", exclude=exclude)} == {"query"}


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("bert", "quary", r'Target \'quary\' is neither .* Did you mean "query"\?.*query \(2\)'),
        ("llama", ["q_prj"], r'Did you mean "q_proj"\?.*q_proj \(2\)'),
        ("bert", "gate", r"Target 'gate': this bert has none\. Its roles: query \(2\)"),
        ("bert", "cross-attention", "this bert has none"),
        ("bert", "classifier", "means only classifier, which is the task head"),
        ("bert", "attention.self", "is a module of this bert, but no linear"),
        ("bert", "norms", "norms are tensors to train"),
        ("bert", "biases", "use BitFit"),
        ("bert", "head", "heads train with every adapter"),
        ("bert", "[", "isn't a regular expression: unterminated"),
        ("bert", ".*nothing.*", "neither a role nor a module"),
        ("bert", [r".*\.query"], "neither a role nor a module"),
        ("bert", [], "must be a word or a list of words"),
        ("bert", "", "must be a word or a list of words"),
        ("bert", [3], "must be a word or a list of words"),
    ],
)
def test_wrong_targets_are_refused(name: str, words: Any, message: str) -> None:
    with pytest.raises(AnatomyError, match=message):
        found(name, words)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (2, r"Layer 2 is out of range: this model has 2 layers \(encoder 0-1\)"),
        ([0, -3], "Layer -3 is out of range"),
        ([True], "Layer True is out of range"),
        (["0"], "Layer '0' is out of range"),
        ([], "empty list"),
        ("5:", "holds none of the model's 2 layers"),
        ("one", "isn't a slice"),
    ],
)
def test_wrong_layers_are_refused(layers: Any, message: str) -> None:
    with pytest.raises(AnatomyError, match=message):
        found("bert", "query", layers=layers)


def test_excluding_everything_is_refused() -> None:
    with pytest.raises(AnatomyError, match="leave nothing to adapt"):
        found("bert", "query", exclude="attention")
    with pytest.raises(AnatomyError, match="leave nothing to adapt in layers 0"):
        found("bert", "embeddings", layers=0)
