"""Equal weights of two models are held once, and what either computes stays the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from graftune.tasks.models import Base, load_base
from graftune.tasks.twins import body_of, share_twins
from tests.tasks import tiny


@pytest.fixture
def bases(tmp_path: Path) -> tuple[Base, Base]:
    folder = tiny.masked_bert(tmp_path)
    return load_base(str(folder), labels=["a", "b"]), load_base(str(folder), "masked-lm")


def test_what_is_equal_lies_in_one_place_and_answers_stay(bases: tuple[Base, Base]) -> None:
    labelled, masked = bases
    batch = labelled.tokenizer("hello good day", return_tensors="pt")
    with torch.no_grad():
        before = labelled.model(**batch).logits, masked.model(**batch).logits
    saved = share_twins(masked.model, labelled.model)
    own, theirs = masked.model.base_model, labelled.model.base_model
    shared = [
        parameter.numel() * 4
        for name, parameter in own.named_parameters()
        if parameter.data_ptr() == dict(theirs.named_parameters())[name].data_ptr()
    ]
    assert saved == sum(shared) > 0
    assert len(shared) == len(list(own.parameters()))
    with torch.no_grad():
        after = labelled.model(**batch).logits, masked.model(**batch).logits
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_tied_tables_stay_tied_and_what_differs_stays_apart(bases: tuple[Base, Base]) -> None:
    labelled, masked = bases
    with torch.no_grad():
        labelled.model.base_model.encoder.layer[0].output.dense.weight.add_(1)
    other = masked.model.base_model.encoder.layer[0].output.dense.weight
    share_twins(masked.model, labelled.model)
    assert masked.model.base_model.encoder.layer[0].output.dense.weight is other
    table = masked.model.get_input_embeddings().weight
    assert masked.model.get_output_embeddings().weight is table
    assert table.data_ptr() == labelled.model.get_input_embeddings().weight.data_ptr()


def test_a_body_is_one_only_with_the_same_parameters(bases: tuple[Base, Base]) -> None:
    model = bases[0].model
    names = {name: tensor.shape for name, tensor in model.base_model.named_parameters()}
    assert body_of(model, names) is model.base_model
    assert body_of(model, {**names, "more": torch.Size([1])}) is None
    assert body_of(model.base_model, names) is None
