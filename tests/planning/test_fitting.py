"""Settings that fit: least harm first, within the budget, ready to train with."""

from __future__ import annotations

import dataclasses

import pytest

import graftune as gt
from graftune.errors import SettingsError
from graftune.planning import PlanSettings
from graftune.planning.fitting import MARGIN, TRAIN_KEYS, train_settings
from graftune.tasks.settings import TrainSettings
from tests.planning.models import BERT as LARGER

BERT = {**LARGER, "num_hidden_layers": 2}
ASKED = {"batch_size": 8, "length": 64}


def peak(**settings: object) -> int:
    return gt.plan(BERT, gt.LoRA(), **(ASKED | settings)).peak_bytes


def room_for(size: int) -> int:
    return int(size / (1 - MARGIN)) + 1


def test_what_fits_is_left_as_it_is() -> None:
    found = gt.fit(BERT, gt.LoRA(), room_for(peak()), **ASKED)
    assert found.changes == ()
    assert found.tried == 1


def test_a_split_batch_comes_before_checkpointing_and_both_before_rounding() -> None:
    split = peak(batch_size=4, accumulation=2)
    found = gt.fit(BERT, gt.LoRA(), room_for(split), **ASKED)
    assert found.changes == ("batch_size=4", "accumulation=2")
    tight = room_for(peak(batch_size=2, accumulation=4) - 2**20)
    harder = gt.fit(BERT, gt.LoRA(), tight, **ASKED)
    assert "gradient_checkpointing=True" in harder.changes
    assert harder.plan.settings.precision == "float32"
    assert harder.plan.settings.batch_size * harder.plan.settings.accumulation == 8


def test_logits_in_pieces_come_before_activations_computed_twice() -> None:
    wide = {"model_type": "llama", "vocab_size": 20_000, "hidden_size": 64, "num_hidden_layers": 1}
    wide |= {
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "architectures": ["LlamaForCausalLM"],
    }
    asked = {"batch_size": 8, "length": 512}
    whole = gt.plan(wide, gt.LoRA(), **asked)
    found = gt.fit(wide, gt.LoRA(), whole.peak_bytes // 6, **asked)
    assert found.changes == ("loss_chunk=512",)
    assert train_settings(found.plan.settings)["loss_chunk"] == 512


def test_rounding_comes_when_nothing_else_is_left() -> None:
    least = peak(batch_size=1, accumulation=8, gradient_checkpointing=True)
    found = gt.fit(BERT, gt.LoRA(), least - 2**21, **ASKED)
    assert "precision=bfloat16" in found.changes
    assert found.plan.peak_bytes <= (1 - MARGIN) * (least - 2**21)


def test_a_budget_below_the_weights_says_so() -> None:
    with pytest.raises(SettingsError, match=r"its weights alone take .*smaller base"):
        gt.fit(BERT, gt.LoRA(), "2MiB", **ASKED)


def test_a_budget_that_is_no_amount_is_refused_before_anything_is_planned() -> None:
    with pytest.raises(SettingsError, match=r'"8 gigs".*expected one of'):
        gt.fit({"model_type": "nothing"}, gt.LoRA(), "8 gigs")


def test_only_what_train_knows_is_proposed() -> None:
    settings = dataclasses.replace(PlanSettings(device="cuda"), quantize="nf4", accumulation=4)
    known = set(TrainSettings.model_fields)
    assert set(train_settings(settings)) <= known
    assert train_settings(settings)["accumulation"] == 4
    assert set(TRAIN_KEYS) <= {field.name for field in dataclasses.fields(PlanSettings)}
