"""Runs of two processes, which gloo connects: the weights of one process with twice the batch."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.processes.runs import CHUNK, METHODS, STEPS, torchrun, trainer

WORKER = "tests.processes.worker"
DDP = tuple(name for name in METHODS if name != "full")
FSDP2 = ("lora", "houlsby", "prompt", "bitfit", "lst", "full")
HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
ZERO3 = FSDP2 if HAS_DEEPSPEED else ()
REFUSED = {"adalora": "train it with DDP", "prefix": "replaces its tensors when training ends"}
FILE = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of what two processes trained, all methods one after another."""
    folder = tmp_path_factory.mktemp("two")
    jobs = [*(f"ddp:{name}" for name in DDP), "ddp:lst:cached", "ddp:lora:best"]
    jobs += ["ddp:lora:chunked", "fsdp:lora:chunked"]
    jobs += [f"fsdp:{name}:own" for name in FSDP2] + [f"fsdp:{name}" for name in REFUSED]
    ended = torchrun(WORKER, str(folder), *jobs)
    check_done(folder, jobs[-1], ended)
    return folder


@pytest.fixture(scope="module")
def zero3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of what two processes trained under ZeRO-3, which DeepSpeed does."""
    folder = tmp_path_factory.mktemp("zero3")
    jobs = [*(f"zero3:{name}:own" for name in ZERO3), *(f"zero3:{name}" for name in REFUSED)]
    jobs += ["zero3:lora:best", "zero3:lora:chunked"]
    ended = torchrun(WORKER, str(folder), *jobs, DS_ACCELERATOR="cpu")
    check_done(folder, jobs[-1], ended)
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Returns what trains a method in this process alone and returns its tensors and loss."""
    folder = tmp_path_factory.mktemp("one")
    done: dict[str, tuple[dict[str, torch.Tensor], float]] = {}

    def trained(method: str, **more: Any) -> tuple[dict[str, torch.Tensor], float]:
        name = "-".join((method, *more))
        if name not in done:
            run = trainer(method, folder / name, **more)
            run.train()
            run.save_model(str(folder / name / "adapter"))
            loss = run.evaluate()["eval_loss"]
            done[name] = load_file(folder / name / "adapter" / FILE), loss
        return done[name]

    return trained


def told(folder: Path, job: str) -> list[dict[str, Any]]:
    """Returns what both processes said of a job."""
    return [json.loads((folder / f"{job}.{rank}.json").read_text()) for rank in (0, 1)]


def check_done(folder: Path, job: str, ended: Any) -> None:
    """Checks that both processes came to the end of their last job.

    How they exited then says nothing: gloo's threads sometimes abort a process that is done.
    """
    done = [(folder / f"{job}.{rank}.json").is_file() for rank in (0, 1)]
    assert done == [True, True], ended.stderr[-3000:]


def check_same(found: Path, expected: dict[str, torch.Tensor]) -> None:
    """Checks that an adapter's directory holds given tensors."""
    tensors = load_file(found / FILE)
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("how", "method"), [*(("ddp", m) for m in DDP), *(("fsdp", m) for m in FSDP2)]
)
def test_two_processes_train_what_one_does_with_twice_the_batch(
    how: str, method: str, two: Path, one: Any
) -> None:
    expected, loss = one(method)
    check_same(two / f"{how}-{method}" / "adapter", expected)
    for said in told(two, f"{how}:{method}" + ":own" * (how == "fsdp")):
        assert said["loss"] == pytest.approx(loss, abs=1e-5)


@pytest.mark.parametrize("method", FSDP2)
def test_shards_are_saved_as_one_whole_adapter(method: str, two: Path, one: Any) -> None:
    check_same(two / f"fsdp-{method}" / "saved", one(method)[0])


@pytest.mark.parametrize("method", REFUSED)
def test_what_cannot_be_sharded_says_so_in_every_process(method: str, two: Path) -> None:
    assert all(REFUSED[method] in said["error"] for said in told(two, f"fsdp:{method}"))


@pytest.mark.skipif(not HAS_DEEPSPEED, reason="needs deepspeed")
@pytest.mark.parametrize("method", ZERO3)
def test_zero3_trains_and_saves_what_one_process_does(method: str, zero3: Path, one: Any) -> None:
    expected, loss = one(method)
    check_same(zero3 / f"zero3-{method}" / "adapter", expected)
    check_same(zero3 / f"zero3-{method}" / "saved", expected)
    for said in told(zero3, f"zero3:{method}:own"):
        assert said["loss"] == pytest.approx(loss, abs=1e-5)


@pytest.mark.skipif(not HAS_DEEPSPEED, reason="needs deepspeed")
def test_zero3_computes_a_loss_in_pieces(zero3: Path, one: Any) -> None:
    expected, _ = one("lora", loss_chunk=CHUNK)
    check_same(zero3 / "zero3-lora-chunked" / "adapter", expected)


@pytest.mark.skipif(not HAS_DEEPSPEED, reason="needs deepspeed")
def test_zero3_refuses_what_it_cannot_shard_and_reads_the_best(zero3: Path, one: Any) -> None:
    for method, why in REFUSED.items():
        assert all(why in said["error"] for said in told(zero3, f"zero3:{method}"))
    check_same(zero3 / "zero3-lora-best" / "adapter", one("lora")[0])


@pytest.mark.skipif(not HAS_DEEPSPEED, reason="needs deepspeed")
def test_zero3_refuses_to_resume_with_another_number_of_processes(zero3: Path) -> None:
    job = f"zero3:lora:from=zero3-lora/checkpoint-{STEPS // 2}"
    torchrun(WORKER, str(zero3), job, processes=1, DS_ACCELERATOR="cpu")
    said = json.loads((zero3 / f"{job.replace('/', '_')}.0.json").read_text())
    assert "cut into 2 parts, and there are 1 processes: resume with 2" in said["error"]


def test_every_process_reads_the_best_checkpoint(two: Path, one: Any) -> None:
    expected, loss = one("lora")  # the last weights are the best
    check_same(two / "ddp-lora-best" / "adapter", expected)
    assert [said["loss"] for said in told(two, "ddp:lora:best")] == pytest.approx([loss] * 2)


def test_processes_keep_what_the_trunk_computes(two: Path, one: Any) -> None:
    check_same(two / "ddp-lst-cached" / "adapter", one("lst")[0])
    assert all("from the trunk cache" in said["trunk"] for said in told(two, "ddp:lst:cached"))


def test_a_loss_in_pieces_is_a_mean_over_the_tokens_of_all_processes(two: Path, one: Any) -> None:
    expected, _ = one("lora", loss_chunk=CHUNK)
    check_same(two / "ddp-lora-chunked" / "adapter", expected)
    assert all("loss_chunk runs" in said["error"] for said in told(two, "fsdp:lora:chunked"))


@pytest.mark.parametrize(
    "how",
    [
        "ddp",
        pytest.param("fsdp", marks=pytest.mark.slow),
        pytest.param("zero3", marks=pytest.mark.skipif(not HAS_DEEPSPEED, reason="needs it")),
    ],
)
def test_a_run_goes_on_after_one_of_its_processes_was_killed(
    how: str, tmp_path: Path, one: Any
) -> None:
    ended = torchrun(WORKER, str(tmp_path), f"{how}:lora:killed")
    assert ended.returncode != 0
    last = f"{how}-lora/checkpoint-{STEPS // 2}"
    assert (tmp_path / last / FILE).is_file()
    assert not list((tmp_path / f"{how}-lora").glob(".*.partial"))
    job = f"{how}:lora:from={last}"
    ended = torchrun(WORKER, str(tmp_path), job)
    check_done(tmp_path, job.replace("/", "_"), ended)
    check_same(tmp_path / f"{how}-lora-resumed" / "adapter", one("lora")[0])
