"""Which norms and biases are meant; counts are those of BERT-base in the papers."""

from __future__ import annotations

import pytest
import transformers

from graftune.anatomy import anatomy, resolve_biases, resolve_norms
from graftune.errors import AnatomyError
from tests.families import FAMILIES


def bert_base() -> transformers.PreTrainedModel:
    with __import__("torch").device("meta"):
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
