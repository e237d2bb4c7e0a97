"""What waits in the host's memory comes back as it was, and nothing else is moved."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graftune as gt
from graftune.errors import TrainingError
from graftune.training.chunked_loss import chunked_loss
from graftune.training.memory import device_peak_bytes, reset_peak_memory
from graftune.training.offloading import Offloading, SavedElsewhere, StateElsewhere
from tests.contract.subjects import Subject
from tests.families import FAMILIES
from tests.training.runs import curve, trainer

METHODS = ["lora", "full", "prefix", "prompt", "pfeiffer", "ladder", "said"]


def gradients(model: nn.Module, batch: dict[str, Any], around: Any) -> list[Tensor]:
    trained = [p for p in model.parameters() if p.requires_grad]
    with around:
        loss = model(**batch).loss
    loss.backward()
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
    model.zero_grad(set_to_none=True)
    return found


class _Nothing:
    def __enter__(self) -> None: ...
    def __exit__(self, *_: Any) -> None: ...


@pytest.mark.parametrize("checkpointed", [None, False, True])
@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_those_of_what_stayed(method: str, checkpointed: bool | None) -> None:
    subject = Subject.of(method, "llama")
    subject.attach()
    model = subject.model.train()
    plain = gradients(model, subject.labelled(), _Nothing())
    if checkpointed is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointed})  # type: ignore[operator]
    moving = SavedElsewhere(model, device="cpu", least=0)  # a copy on the same device
    moved = gradients(model, subject.labelled(), moving)
    assert moving.bytes > 0
    for one, other in zip(plain, moved, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def test_parameters_and_small_tensors_stay() -> None:
    model = nn.Linear(64, 64)
    x = torch.ones(8, 64)
    for least, bytes_moved in ((0, 8 * 64 * 4), (8 * 64 * 4, 8 * 64 * 4), (8 * 64 * 4 + 1, 0)):
        moving = SavedElsewhere(model, device="cpu", least=least)
        with moving:
            model(x)  # keeps x and its weight
        assert moving.bytes == bytes_moved


def test_a_chunked_loss_has_its_states_moved() -> None:
    subject = Subject.of("lora", "llama")
    subject.attach()
    model = subject.model.train()
    plain = gradients(model, subject.labelled(), _Nothing())
    with chunked_loss(model, 4):
        moved = gradients(model, subject.labelled(), SavedElsewhere(model, device="cpu", least=0))
    for one, other in zip(plain, moved, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_an_optimizer_whose_state_is_elsewhere_steps_alike(kind: Any) -> None:
    options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    found: list[list[Tensor]] = []
    for moves in (False, True):
        torch.manual_seed(0)
        weights = [nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(3))]
        optimizer = kind(weights, lr=0.1, **options)
        moved = StateElsewhere(optimizer, device="cpu") if moves else None
        for _ in range(3):
            for weight in weights:
                weight.grad = weight.detach().sin()
            optimizer.step()
        found.append([w.detach() for w in weights])
        if moved is not None:
            states = 15 * (2 if kind is torch.optim.AdamW else 1) * 4
            assert moved.bytes == states + (2 * 4 if kind is torch.optim.AdamW else 0)
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize(
    ("asked", "args", "words"),
    [
        ({"activations": True}, {"device": "cpu"}, "offload_activations moves what a GPU holds"),
        ({"optimizer": True}, {"device": "cpu"}, "offload_optimizer moves what a GPU holds"),
        ({"optimizer": True}, {"optim": "paged_adamw_8bit"}, "pages its state to the host"),
        ({"optimizer": True}, {"fsdp": ["full_shard"]}, "FSDP keep the optimizer's state"),
        ({"optimizer": True}, {"deepspeed": "ds.json"}, "DeepSpeed and FSDP keep"),
    ],
)
def test_what_would_have_no_effect_is_refused(
    asked: dict[str, bool], args: dict[str, Any], words: str
) -> None:
    base = {"device": "cuda", "optim": "adamw_torch", "deepspeed": None, "fsdp": []} | args
    given: Any = SimpleNamespace(**{**base, "device": torch.device(base["device"])})
    with pytest.raises(TrainingError, match=words):
        Offloading(**{"activations": False, "optimizer": False, **asked}).check(given)


def test_the_trainer_refuses_it_where_there_is_no_gpu(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="training runs on the cpu, where it would have no eff"):
        trainer(tmp_path, offload_activations=True)


@pytest.mark.gpu
def test_a_run_on_a_gpu_is_the_same_and_holds_less(tmp_path: Path) -> None:
    runs: list[Any] = []
    for moves in (False, True):
        run = trainer(
            tmp_path / str(moves),
            gt.FullFineTuning(),
            model=FAMILIES["bert"].build("classification", hidden_size=512, num_hidden_layers=4),
            use_cpu=False,
            save_strategy="no",
            offload_activations=moves,
            offload_optimizer=moves,
        )
        reset_peak_memory()
        run.train()
        runs.append((run, device_peak_bytes()))
        state = run.optimizer.optimizer.state.values()
        big = [v for s in state for v in s.values() if isinstance(v, Tensor) and v.ndim]
        assert {v.device.type for v in big} == {"cpu" if moves else "cuda"}
    (plain, _), (moved, _) = runs
    assert curve(plain) == curve(moved)
    for one, other in zip(plain.model.parameters(), moved.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.gpu
def test_saved_activations_leave_the_gpu() -> None:
    model = nn.Sequential(*[nn.Sequential(nn.Linear(512, 512), nn.GELU()) for _ in range(8)]).cuda()
    peaks: list[int] = []
    for around in (_Nothing(), SavedElsewhere(model)):
        x = torch.ones(8192, 512, device="cuda")
        torch.cuda.reset_peak_memory_stats()
        with around:
            loss = model(x).sum()
        loss.backward()
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] < 0.6 * peaks[0]
