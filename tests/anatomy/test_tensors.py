"""Which norms and biases are meant; counts are those of BERT-base in the papers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from graftune.anatomy import anatomy, resolve_biases, resolve_norms, resolve_tensors
from graftune.errors import AnatomyError
from tests.families import FAMILIES


def bert_base() -> transformers.PreTrainedModel:
    with torch.device("meta"):
        return transformers.BertForSequenceClassification(transformers.BertConfig())


def numbers(model: transformers.PreTrainedModel, names: tuple[str, ...]) -> int:
    return sum(model.get_parameter(name).numel() for name in names)


@pytest.mark.parametrize(
    ("subset", "count"),
    [
        ("all", 102_912),
        ("query+intermediate", 46_080),
        ("no-norm", 83_712),
        (r".*\.attention\.self\.query\.bias", 12 * 768),
    ],
)
def test_biases_of_bert_base_are_as_many_as_in_the_paper(subset: str, count: int) -> None:
    model = bert_base()
    names = resolve_biases(anatomy(model), subset)
    assert numbers(model, names) == count
    assert not any(name.startswith("classifier") for name in names)


def test_norms_of_bert_base_are_its_25_layer_norms() -> None:
    model = bert_base()
    names = resolve_norms(model, anatomy(model))
    assert len(names) == 50
    assert numbers(model, names) == 50 * 768


def test_layers_limit_norms_and_biases() -> None:
    model = FAMILIES["bert"].build(meta=True)
    found = anatomy(model)
    assert all(".layer.1." in name for name in resolve_norms(model, found, layers=-1))
    assert all(".layer.0." in name for name in resolve_biases(found, layers=[0]))


@pytest.mark.parametrize("name", ["t5", "llama", "mt5"])
def test_a_model_without_biases_is_refused(name: str) -> None:
    with pytest.raises(AnatomyError, match=f"This {name} has no biases outside its head"):
        resolve_biases(anatomy(FAMILIES[name].build(meta=True)))


def test_a_subset_that_matches_nothing_names_the_nearest() -> None:
    found = anatomy(FAMILIES["bert"].build(meta=True))
    with pytest.raises(AnatomyError, match=r'match none of this bert.*Did you mean "no-norm"'):
        resolve_biases(found, "no-norms")
    with pytest.raises(AnatomyError, match="isn't a regular expression"):
        resolve_biases(found, "(")


def test_relative_position_tables_are_no_biases() -> None:
    found = anatomy(FAMILIES["swin"].build(meta=True))
    assert not any("relative_position" in name for name in found.biases)


def named(family: str, *asked: Any, task: Any = "default", **more: Any) -> tuple[str, ...]:
    model = FAMILIES[family].build(meta=True, task=task)
    return resolve_tensors(model, anatomy(model), *asked, **more)


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        ("attention", 28_348_416),
        ("ffn", 56_669_184),
        ("norms", 38_400),
        ("biases", 102_912),
        ("embeddings", 30_522 * 768 + 514 * 768),
        ("head", 1_538),
        ("all", 109_482_240),
        (["attention", "ffn", "norms"], 85_054_464 + 1_536),
        ("blocks", 85_054_464),
    ],
)
def test_words_mean_as_many_numbers_of_bert_base_as_are_known(targets: Any, count: int) -> None:
    model = bert_base()
    assert numbers(model, resolve_tensors(model, anatomy(model), targets)) == count


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_attention_ffn_and_norms_are_all_of_the_blocks(family: str) -> None:
    parts = named(family, ["attention", "ffn", "norms"], layers=":")
    assert parts == named(family, "blocks")


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_all_is_every_parameter_but_the_task_heads(family: str) -> None:
    model = FAMILIES[family].build(meta=True)
    found = anatomy(model)
    heads = tuple(f"{head}." for head in found.heads)
    expected = [n for n, _ in model.named_parameters() if not heads or not n.startswith(heads)]
    assert list(resolve_tensors(model, found, "all")) == expected


def test_names_and_their_ends_mean_all_tensors_below() -> None:
    whole = named("bert", "bert.encoder.layer.1")
    assert named("bert", "layer.1") == whole == named("bert", "blocks", -1)
    assert len(whole) == 16
    assert named("bert", "query.bias", 0) == ("bert.encoder.layer.0.attention.self.query.bias",)
    assert named("bert", ["classifier"]) == ("classifier.weight", "classifier.bias")
    assert len(named("bert", r".*\.(query|key)\.weight")) == 4


def test_exclusions_are_left_out_again() -> None:
    assert all(n.endswith("weight") for n in named("bert", "attention", exclude="biases"))
    assert named("gpt2", "attention", exclude="c_proj", layers=0) == (
        "transformer.h.0.attn.c_attn.weight",
        "transformer.h.0.attn.c_attn.bias",
    )
    assert named("llama", "attention", exclude=["biases"]) == named("llama", "attention")
    with pytest.raises(AnatomyError, match='Did you mean "biases"'):
        named("llama", "attention", exclude=["biasses"])
    with pytest.raises(AnatomyError, match="leave no tensor in layers 1"):
        named("bert", "embeddings", 1)
    with pytest.raises(AnatomyError, match="'norms' without 'all' leave no tensor"):
        named("bert", "norms", exclude="all")


def test_experts_and_tables_of_relative_positions_are_among_their_sublayers() -> None:
    assert [name.partition("mlp.")[2] for name in named("mixtral", "ffn", 0)] == [
        "gate.weight",
        "experts.gate_up_proj",
        "experts.down_proj",
    ]
    assert named("mixtral", "down", 0) == ("model.layers.0.mlp.experts.down_proj",)
    assert sum("relative_attention_bias" in name for name in named("t5", "attention")) == 2
    assert not any("SelfAttention" in name for name in named("t5", "cross-attention"))


def test_tied_tensors_go_by_their_first_name_once() -> None:
    assert named("t5", "embeddings") == ("shared.weight",)
    assert named("gpt2", "all").count("transformer.wte.weight") == 1
    assert "lm_head.weight" not in named("gpt2", "all")


@pytest.mark.parametrize("targets", ["head", "lm_head", ["lm_head.weight"]])
def test_what_is_only_tied_to_another_is_refused_with_its_name(targets: Any) -> None:
    with pytest.raises(AnatomyError, match=r"tied to transformer\.wte\.weight.*trains both"):
        named("gpt2", targets)


def test_a_head_around_a_tied_matrix_is_the_rest_of_it() -> None:
    model = transformers.BertForMaskedLM(FAMILIES["bert"].config())
    head = resolve_tensors(model, anatomy(model), "head")
    assert head == tuple(n for n, _ in model.named_parameters() if n.startswith("cls."))
    assert len(head) == 5


def test_a_fused_tensor_is_meant_whole_or_not_at_all() -> None:
    assert len(named("gpt2", ["query", "key", "value"])) == 4
    with pytest.raises(AnatomyError, match=r"c_attn\.weight holds query together with key and v"):
        named("gpt2", "query")
    with pytest.raises(AnatomyError, match=r'gate_up_proj holds up together with gate.*"experts"'):
        named("mixtral", "up")
    with pytest.raises(AnatomyError, match="together with"):
        named("gpt2", "attention", exclude="value")


def test_quantised_tensors_are_refused() -> None:
    model = FAMILIES["bert"].build()
    query = model.get_submodule("bert.encoder.layer.1.attention.self.query")
    packed = torch.zeros(512, 1, dtype=torch.uint8)
    query.weight = torch.nn.Parameter(packed, requires_grad=False)
    found = anatomy(model)
    with pytest.raises(AnatomyError, match=r"1 of the 16 tensors.*layer\.1.*query\.weight \(uint8"):
        resolve_tensors(model, found, "attention")
    del query.weight
    with pytest.raises(AnatomyError, match=r"query\.weight \(packed\): load the base in 16 or 32"):
        resolve_tensors(model, found, "attention")
    assert len(resolve_tensors(model, found, "biases")) == 18
    assert len(resolve_tensors(model, found, "attention", layers=0)) == 8


@pytest.mark.parametrize(
    ("family", "targets", "words"),
    [
        ("bert", "atention", 'neither a role.*Did you mean "attention"'),
        ("bert", ["intermediate.dens"], 'Did you mean "intermediate.dense'),
        ("t5", "biases", "'biases': this t5 has none. Its roles: query"),
        ("bert", "cross-attention", "this bert has none"),
        ("bert", "(", "isn't a regular expression"),
        ("bert", [], "must be a word or a list of words"),
        ("bert", [3], "must be a word or a list of words"),
    ],
)
def test_what_means_nothing_is_refused(family: str, targets: Any, words: str) -> None:
    with pytest.raises(AnatomyError, match=words):
        named(family, targets)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_what_runs_once_for_all_rows_is_known(family: str) -> None:
    model = FAMILIES[family].build()
    found, shapes = anatomy(model), dict[str, torch.Size]()

    def look(name: str) -> Any:
        return lambda _, __, output: shapes.update(
            {name: getattr(output, "shape", torch.Size([0]))}
        )

    owners = {name.rpartition(".")[0] for name, _ in model.named_parameters()} - {""}
    for owner in owners:
        model.get_submodule(owner).register_forward_hook(look(owner))
    model(**FAMILIES[family].inputs(batch=13, length=5))
    once = {name for name, shape in shapes.items() if shape[0] % 13 and "experts" not in name}
    assert once <= set(found.once_for_all_rows)
