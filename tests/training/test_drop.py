"""AdapterDrop in Trainers: `gt.activate(..., drop=)` holds through all that they do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers

import graftune as gt
from tests.training.models import examples, tiny
from tests.training.runs import args, curve, trainer

KINDS = {"stock": transformers.Trainer, "ours": gt.Trainer}


def subject(drop: Any) -> Any:
    model = tiny()
    gt.attach(model, gt.PfeifferAdapter(bottleneck=4), name="task", seed=0)
    gt.activate(model, "task", drop=drop)
    return model


def noted(model: Any) -> list[tuple[bool, int]]:
    """Returns a list of (training, blocks dropped), to which each pass comes."""
    seen: list[tuple[bool, int]] = []
    active = gt.state_of(model).active
    model.bert.encoder.layer[0].register_forward_hook(
        lambda layer, *_: seen.append((layer.training, active.current().drop))
    )
    return seen


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("drop", [1, gt.AdapterDrop(high=2)])
def test_it_holds_through_evaluations_checkpoints_and_ours_loading_the_best(
    kind: str, drop: Any, tmp_path: Path
) -> None:
    model = subject(drop)
    seen = noted(model)
    given: dict[str, Any] = {
        "eval_strategy": "steps", "eval_steps": 4, "per_device_eval_batch_size": 8,
        "load_best_model_at_end": kind == "ours", "metric_for_best_model": "loss",
    }  # fmt: skip
    run = KINDS[kind](
        model=model,
        args=args(tmp_path, **given),
        train_dataset=examples(),
        eval_dataset=examples(8, seed=1),
        data_collator=trainer(tmp_path / "other").data_collator,
    )
    run.train()
    run.evaluate()
    rest = drop if isinstance(drop, int) else 0
    wanted = {drop} if isinstance(drop, int) else {0, 1, 2}
    assert {n for training, n in seen if training} == wanted
    assert {n for training, n in seen if not training} == {rest}
    assert gt.state_of(model).active.plan.schedule == gt.AdapterDrop.of(drop)


def test_a_resumed_run_draws_what_the_whole_one_drew(tmp_path: Path) -> None:
    drop = gt.AdapterDrop(high=2)
    whole = trainer(tmp_path / "whole", model=subject(drop))
    whole.train()
    resumed = trainer(tmp_path / "other", model=subject(drop))
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-8"))
    assert curve(resumed) == curve(whole)
