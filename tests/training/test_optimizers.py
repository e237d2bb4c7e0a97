"""Optimizers by transformers' names: they run here, or are refused before any work."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

import graftune as gt
from graftune.errors import TrainingError
from graftune.training.optimizers import check_optimizer
from tests.training.models import tiny
from tests.training.runs import args, curve, trainer

QUANTISED = ["adamw_bnb_8bit", "lion_8bit", "paged_adamw_32bit", "paged_adamw_8bit"]


@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_quantised_and_paged_optimizers_train_where_bitsandbytes_has_kernels(
    name: str, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    try:
        check_optimizer(args(tmp_path, optim=name))
    except TrainingError as error:
        pytest.skip(str(error))
    model = tiny(dropout=0.0)
    gt.attach(model, gt.FullFineTuning(), name="task", seed=0)
    before = [p.detach().clone() for p in model.parameters()]
    run = trainer(tmp_path, model=model, optim=name, learning_rate=1e-3, save_strategy="no")
    run.train()
    assert all(torch.isfinite(torch.tensor(row)).all() for row in curve(run))
    moved = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert sum(moved) > 0.9 * len(moved)
    kinds = {v.dtype for s in run.optimizer.optimizer.state.values() for k, v in s.items()
             if k.startswith("state")}  # fmt: skip
    assert (torch.uint8 in kinds) == ("8bit" in name)


def test_an_optimizer_without_its_package_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match='"lomo" can\'t run on the cpu here: ImportError: You '):
        trainer(tmp_path, optim="lomo")


def test_an_optimizer_without_kernels_for_the_device_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Without(torch.optim.SGD):
        def step(self, closure: object = None) -> None:
            raise NotImplementedError("No kernel.\nOf this kind.")

    monkeypatch.setattr(
        transformers.Trainer, "get_optimizer_cls_and_kwargs", lambda *_: (Without, {"lr": 1.0})
    )
    with pytest.raises(TrainingError, match=r"cpu here: NotImplementedError: No kernel\.$"):
        check_optimizer(args(tmp_path, optim="adamw_bnb_8bit"))
