"""What is chosen for which facts, and that each part of it has its reason."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import pytest

import graftune as gt
from graftune.planning.choosing import FEW, LARGE, MANY, MORE, Facts, choose, told
from graftune.planning.settings import PlanSettings
from graftune.tasks.resolving import method_of
from graftune.tasks.settings import TrainSettings

ENCODER = Facts(
    task="classification", rows=5_000, parameters=110_000_000, is_encoder=True, has_biases=True
)
DECODER = dataclasses.replace(ENCODER, task="instruct", is_encoder=False, has_biases=False)


def of(facts: Facts, **changes: Any) -> Facts:
    return dataclasses.replace(facts, **changes)


def lora(r: int) -> dict[str, Any]:
    return {"name": "LoRA", "r": r, "targets": "blocks"}


SHORT = {"epochs": 20.0, "warmup": 0.1}
TABLE: list[tuple[Facts, dict[str, Any], dict[str, Any]]] = [
    (ENCODER, lora(8), {}),
    (of(ENCODER, rows=FEW - 1), {"name": "BitFit"}, SHORT),
    (of(ENCODER, rows=FEW - 1, task="regression"), {"name": "BitFit"}, SHORT),
    (of(ENCODER, rows=FEW - 1, task="multilabel"), {"name": "BitFit"}, SHORT),
    (of(ENCODER, rows=FEW), lora(8), {}),
    (of(ENCODER, rows=FEW - 1, has_biases=False), lora(8), SHORT),
    (of(ENCODER, rows=FEW - 1, task="labelling"), lora(8), SHORT),
    (of(ENCODER, rows=FEW - 1, task="spans"), lora(8), {}),
    (of(ENCODER, rows=MORE), lora(16), {}),
    (of(ENCODER, rows=MANY), lora(64), {"epochs": 3.0}),
    (of(ENCODER, rows=FEW - 1, is_encoder=False), lora(8), SHORT),
    (DECODER, lora(8), {}),
    (of(DECODER, rows=FEW - 1), lora(8), {}),
    (of(DECODER, rows=MANY), lora(64), {}),
    (of(DECODER, parameters=LARGE), lora(8), {"lr": 2e-4}),
    (of(DECODER, parameters=70 * LARGE), lora(8), {"lr": 1e-4}),
    (of(DECODER, task="choices", rows=32), {"name": "IA3"},
     {"optimizer": "adafactor", "steps": 1000}),
    (of(DECODER, task="choices", rows=FEW), lora(8), {}),
]  # fmt: skip


@pytest.mark.parametrize(("facts", "method", "train"), TABLE)
def test_the_choice_for_each_kind_of_data_and_base(
    facts: Facts, method: dict[str, Any], train: dict[str, Any]
) -> None:
    found = choose(facts)
    assert (found.method, found.train) == (method, train)
    assert method_of(found.method).name == method["name"]
    assert TrainSettings(**found.train)
    assert found.reasons[0].startswith(method["name"])
    for value in (method.get("r"), *train.values()):
        if value is not None:
            shown = f"{value:,}" if isinstance(value, int) else str(value).removesuffix(".0")
            said = {"0.1": "A tenth", "0.0001": "0.0001", "adafactor": "Adafactor"}
            assert any(said.get(shown, shown) in reason for reason in found.reasons), shown


@pytest.mark.parametrize(("facts", "method", "train"), TABLE)
def test_what_is_given_is_neither_changed_nor_given_a_reason(
    facts: Facts, method: dict[str, Any], train: dict[str, Any]
) -> None:
    found = choose(facts, given=("steps", "warmup", "lr", "optimizer"))
    assert (found.method, found.train) == (method, {})
    assert len(found.reasons) == (2 if method["name"] == "LoRA" else 1)


def test_how_long_it_trains_is_one_setting_of_two_names() -> None:
    few = of(ENCODER, rows=50)
    assert choose(few, given=["epochs"]).train == {"warmup": 0.1}
    assert choose(few, given=["steps"]).train == {"warmup": 0.1}
    assert choose(of(DECODER, task="choices", rows=50), given=["steps"]).train == {
        "optimizer": "adafactor"
    }


@dataclass
class Made:
    """A fit that somebody made."""

    changes: tuple[str, ...]
    budget_bytes: int = 6 * 2**30
    plan: Any = field(default_factory=lambda: None)


def test_each_change_for_memory_is_told_once_and_no_other() -> None:
    @dataclass
    class Planned:
        settings: PlanSettings
        peak_bytes: int = 3 * 2**30

    settings = PlanSettings(batch_size=4, accumulation=4, length=99, quantize="nf4")
    as_it_is = told(Made((), plan=Planned(settings)))
    assert len(as_it_is) == 1
    assert "99 tokens" in as_it_is[0]
    assert "3.00 GiB of 6.00 GiB" in as_it_is[0]
    changes = ("batch_size=4", "accumulation=4", "quantize=nf4", "double_quant=True")
    first, split, packed = told(Made(changes, plan=Planned(settings)))
    assert first == as_it_is[0]
    assert "4 parts of 4" in split
    assert "nf4" in packed


def test_what_is_chosen_is_a_method_that_the_library_has() -> None:
    names = {method["name"] for _, method, _ in TABLE}
    assert names <= gt.methods().keys()
