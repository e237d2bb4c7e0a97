from __future__ import annotations

import graftune as gt
from graftune.planning import timing
from tests.planning.models import BERT


def test_a_device_that_isnt_here_has_no_speed(monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert timing.speed.__wrapped__("cuda", "float32") is None


def test_a_step_takes_its_operations_over_the_speed(monkeypatch) -> None:
    monkeypatch.setattr(timing, "speed", lambda device, precision: (1e9, float("inf")))
    found = gt.plan(BERT, gt.LoRA(), timed=True, batch_size=2, length=16)
    assert found.seconds_per_step == found.flops / 1e9
