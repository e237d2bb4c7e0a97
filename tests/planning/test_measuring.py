"""The check of a plan: real steps in a fresh process."""

from __future__ import annotations

import sys

import pytest

import graftune as gt
from graftune.errors import SettingsError
from graftune.planning.measuring import measure
from graftune.planning.skeletons import base_of
from tests.planning.models import BERT

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@linux
@pytest.mark.slow
@pytest.mark.parametrize("method", [gt.LoRA(), gt.FullFineTuning()], ids=["lora", "full"])
def test_a_process_rises_as_far_as_planned(method: gt.methods.base.Method) -> None:  # pyright: ignore
    plan = gt.plan(BERT, method, batch_size=32, length=64)
    found = measure(plan, base_of(BERT, None, 2).config)
    assert plan.rise_bytes > 100 * 2**20
    assert found.rise_bytes == pytest.approx(plan.rise_bytes, rel=0.2)


def test_what_cant_be_checked_says_why() -> None:
    plan = gt.plan(BERT, gt.LoRA(), length=16, optimizer="adamw_8bit")
    with pytest.raises(SettingsError, match="without quantisation"):
        measure(plan, base_of(BERT, None, 2).config)
