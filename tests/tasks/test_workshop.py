"""What runs of one workshop share changes none of their numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from graftune.tasks.result import RunResult, Silent
from graftune.tasks.settings import RunSettings
from graftune.tasks.training_run import TrainingRun
from graftune.tasks.workshop import ALONE, Source, Workshop
from tests.tasks import tiny


def result(settings: RunSettings, out: Path, source: Source) -> RunResult:
    run = TrainingRun.prepared(settings.replaced(out=str(out)), Silent(), source)
    return run.run(resume=False, overwrite=True)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workshop")
    tiny.bert(folder / "base")
    tiny.write_jsonl(folder / "mail.jsonl", tiny.mail(60))
    return folder


def settings(place: Path, method: object, seed: int, **train: object) -> RunSettings:
    return RunSettings(
        base=str(place / "base"),
        data=str(place / "mail.jsonl"),
        method=method,
        train={"steps": 8, "seed": seed, "lr": 0.01, **train},
    )


LADDER = {"name": "laddersidetuning", "reduction": 2}


def test_each_run_has_the_numbers_that_it_has_alone(place: Path, tmp_path: Path) -> None:
    shared = Workshop(tmp_path / "shared")
    known: dict[str, RunResult] = {}
    for method, seed in (("lora", 0), (LADDER, 0), (LADDER, 1), (LADDER, 0)):
        told = settings(place, method, seed)
        out = tmp_path / f"alone-{told.method_name}-{seed}"
        if out.name not in known:
            known[out.name] = result(told, out, ALONE)
        alone = known[out.name]
        kept = result(told, tmp_path / "kept", shared)
        assert kept.history == alone.history
        assert kept.metrics == alone.metrics
        assert kept.confusion == alone.confusion
    assert len(list((tmp_path / "shared" / "trunk").iterdir())) == 2
    fed = [note for note in kept.notes if "trunk cache" in note]
    assert fed
    assert not fed[0].startswith("32 of")


def test_data_and_tokens_are_made_once_and_a_copy_of_the_base_is_the_runs_own(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from graftune.tasks import workshop

    calls: list[str] = []
    for name in ("load", "load_base"):
        made = getattr(workshop, name)

        def counted(*given: object, made=made, name=name, **more: object) -> object:
            calls.append(name)
            return made(*given, **more)

        monkeypatch.setattr(workshop, name, counted)
    shared = Workshop()
    runs = [
        TrainingRun.prepared(settings(place, "lora", seed), Silent(), shared) for seed in (0, 0, 1)
    ]
    models = [run._ready()[0].model for run in runs]
    assert calls == ["load", "load_base", "load_base"]
    assert torch.equal(models[0].classifier.weight, models[1].classifier.weight)
    assert not torch.equal(models[0].classifier.weight, models[2].classifier.weight)
    with torch.no_grad():
        models[0].classifier.weight.zero_()
    assert runs[0]._ready()[0].model.classifier.weight.abs().sum() > 0
    runs[0].data.splits.pop("test")
    assert "test" in TrainingRun.prepared(runs[0].settings, Silent(), shared).data.splits


def test_a_run_ends_when_its_time_is_up_with_what_it_measured(place: Path, tmp_path: Path) -> None:
    timed = settings(place, "lora", 0, seconds=1e-6, steps=500, eval_every=50, save_every=50)
    found = result(timed, tmp_path / "timed", ALONE)
    assert max(row["step"] for row in found.history) == 1
    assert found.metrics["validation"]["accuracy"] >= 0
    assert found.metrics["test"]


def test_a_probe_and_prompts_read_the_kept_base_and_have_the_numbers_they_have_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from graftune.tasks import workshop
    from graftune.tasks.in_context_run import InContextRun
    from graftune.tasks.probe import run_probe

    base = tiny.llama(tmp_path / "base", positions=256)
    data = tiny.write_jsonl(tmp_path / "mail.jsonl", tiny.mail(60))
    prompts = {"name": "in-context", "shots": 2}
    plain = RunSettings(base=str(base), data=str(data))

    def probed(name: str, source: Source) -> RunResult:
        return run_probe(plain.replaced(out=str(tmp_path / name)), Silent(), True, source)

    def prompted(name: str, source: Source) -> RunResult:
        told = plain.replaced(method=prompts, out=str(tmp_path / name))
        return InContextRun.prepared(told, Silent(), source).run(resume=False, overwrite=True)

    alone = probed("probe", ALONE), prompted("prompts", ALONE)
    calls: list[str] = []
    made = workshop.load_base

    def counted(spec: str, task: str, **more: object) -> object:
        calls.append(task)
        return made(spec, task, **more)

    monkeypatch.setattr(workshop, "load_base", counted)
    shared = Workshop(tmp_path / "shared")
    first = result(plain.replaced(method="lora", train={"steps": 2}), tmp_path / "a", shared)
    held: list[int] = []
    found: list[RunResult] = []
    for make in (probed, prompted, prompted):
        shared.lent = 0
        found.append(make("kept", shared))
        held.append(shared.lent)
    assert calls == ["classification", "lm"]
    for kept, one in zip(found, (*alone, alone[1]), strict=True):
        assert kept.metrics == one.metrics
        assert kept.parameters == one.parameters
    assert held == [found[0].base_bytes, 0, found[1].base_bytes]
    again = result(plain.replaced(method="lora", train={"steps": 2}), tmp_path / "b", shared)
    assert again.history == first.history
