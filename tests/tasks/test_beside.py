"""Runs of a fusion: its members from other runs' directories, kept with it, measured and drawn."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import graftune as gt
from graftune.compare.report import write_report
from graftune.errors import BaseMismatchError, FormatError, SettingsError
from graftune.formats.tensors import read_tensors
from graftune.tasks import run
from graftune.tasks.result import RunResult, Silent
from graftune.tasks.settings import RunSettings
from tests.tasks import tiny

WEIGHTS = "adapter_model.safetensors"
MEMBER = {"name": "pfeiffer", "bottleneck": 4}
TRAIN = {"epochs": 2, "lr": 1e-2, "batch_size": 8}


def topics() -> list[dict[str, str]]:
    """Returns rows of another task, with another number of labels."""
    words = {"yes": "a", "no": "b", "day": "c"}
    starts = [f"{x} {y} {z}" for x in tiny.WORDS[:4] for y in tiny.WORDS[4:8] for z in ("i", "my")]
    return [
        {"text": f"{start} {w}", "label": label} for start in starts for w, label in words.items()
    ]


def fused(folder: Path, **values: Any) -> RunSettings:
    made = RunSettings(
        base=str(folder / "bert"), data=str(folder / "mail.jsonl"), out=str(folder / "ab"),
        method={"name": "AdapterFusion", "members": ["a", "b"]}, train=TRAIN,
        beside={"a": str(folder / "a"), "b": str(folder / "b" / "adapter")},
    )  # fmt: skip
    return made.replaced(**values)


@pytest.fixture(scope="module")
def stage_one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with a base, data, and the finished runs "a" and "b"."""
    folder = tmp_path_factory.mktemp("fusion")
    tiny.bert(folder / "bert")
    for name, rows in (("mail", tiny.mail(80)), ("topics", topics())):
        tiny.write_jsonl(folder / f"{name}.jsonl", rows)
    for name, data in (("a", "mail"), ("b", "topics")):
        run.train(
            RunSettings(
                base=str(folder / "bert"),
                data=str(folder / f"{data}.jsonl"),
                method=MEMBER,
                out=str(folder / name),
                train={**TRAIN, "save_every": 0},
            )
        )
    return folder


@pytest.fixture(scope="module")
def stage_two(stage_one: Path) -> tuple[Path, RunResult]:
    return stage_one, run.train(fused(stage_one))


def answers(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "predictions.test.jsonl").open()]


def test_only_the_fusion_and_its_head_train(stage_two: tuple[Path, RunResult]) -> None:
    folder, result = stage_two
    assert result.parameters["trainable"] == 2 * (3 * 32 * 32 + 2 * 32) + 2 * 32 + 2
    for name in "ab":
        before = (folder / name / "adapter" / WEIGHTS).read_bytes()
        assert (folder / "ab" / "beside" / name / WEIGHTS).read_bytes() == before
    kept = read_tensors(folder / "ab" / "adapter" / WEIGHTS)
    assert not [name for name in kept if ".down" in name or ".up" in name]


def test_its_head_is_fitted_to_the_mean_of_its_members(
    stage_one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def look(ready: Any, *_: Any) -> bool:
        seen.append(gt.state_of(ready.model).active.current().composition)
        return True

    monkeypatch.setattr("graftune.tasks.head_start.start_head", look)
    run.train(fused(stage_one, out=str(tmp_path / "run"), train={"epochs": None, "steps": 1}))
    assert seen == [gt.Average("a", "b")]


def test_a_run_that_moved_predicts_without_the_others(
    stage_two: tuple[Path, RunResult], tmp_path: Path
) -> None:
    folder, result = stage_two
    moved = Path(shutil.copytree(folder / "ab", tmp_path / "elsewhere"))
    settings = (moved / "run.yaml").read_text().replace(str(folder / "a"), "nowhere")
    (moved / "run.yaml").write_text(settings)
    rows = answers(moved)
    for place in (moved, moved / "adapter"):
        found = run.predict(place, [row["text"] for row in rows], 16)
        assert [one["probabilities"] for one in found] == [row["probabilities"] for row in rows]
    assert run.evaluate(moved, batch_size=16)["metrics"] == result.metrics["test"]
    alone = Path(shutil.copytree(moved / "adapter", tmp_path / "alone" / "adapter"))
    with pytest.raises(FormatError, match="attends to the adapters a, b, which lie in its run's"):
        run.predict(alone, ["hello"])


def test_attention_is_measured_saved_and_drawn(
    stage_two: tuple[Path, RunResult], tmp_path: Path
) -> None:
    folder, result = stage_two
    (drawn,) = result.heat_maps
    assert list(drawn["rows"]) == ["ffn.a", "ffn.b"]
    assert list(drawn["columns"]) == ["0", "1"]
    assert [sum(column) for column in zip(*drawn["values"], strict=True)] == pytest.approx([1, 1])
    saved = read_tensors(folder / "ab" / "adapter" / WEIGHTS)
    attention = [tensor.tolist() for name, tensor in saved.items() if name.endswith(".attention")]
    assert attention == [list(column) for column in zip(*drawn["values"], strict=True)]
    page = write_report(result, tmp_path / "report.html").read_text("utf-8")
    assert "Attention to each adapter" in page
    assert "<title>ffn.a, 1: " in page
    assert "Attention to each adapter was measured on the validation rows." in result.notes


def test_an_interrupted_run_resumes_from_its_own_copies(
    stage_two: tuple[Path, RunResult], tmp_path: Path
) -> None:
    folder, result = stage_two
    for name in "ab":
        shutil.copytree(folder / name, tmp_path / name)
    made = fused(folder, out=str(tmp_path / "run")).replaced(
        beside={"a": str(tmp_path / "a"), "b": str(tmp_path / "b")}
    )

    class Interrupting(Silent):
        def on_eval(self, metrics: dict[str, Any]) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.train(made, watch=Interrupting())
    for name in "ab":
        shutil.rmtree(tmp_path / name)
    resumed = run.train(made, resume=True)
    assert resumed.history == result.history
    assert resumed.heat_maps == result.heat_maps
    assert resumed.metrics == result.metrics


def test_members_without_bottlenecks_are_refused(stage_one: Path, tmp_path: Path) -> None:
    model = gt.attach(_base(stage_one), gt.LoRA(r=2), "lora").save(tmp_path / "lora")
    with pytest.raises(SettingsError, match='"a" also changes'):
        run.train(fused(stage_one, beside={"a": str(model)}, out=str(tmp_path / "run")))


def _base(folder: Path) -> Any:
    from graftune.tasks.models import load_base

    return load_base(str(folder / "bert"), labels=["x", "y"]).model


@pytest.mark.parametrize(
    ("method", "beside", "words"),
    [
        (["a", "c"], {}, 'attends to "c", which beside doesn\'t name: .* beside: {c: runs/c}'),
        (["a", "bee"], {"be": "x"}, 'attends to "bee".*Did you mean "be"'),
        (["a", "b"], {"d": "x"}, r'beside names "d", which AdapterFusion has no use for.*a, b'),
        (["a", "b"], {"a/b": "x"}, '"a/b" is no name'),
    ],
)
def test_names_are_checked_before_any_work(
    method: list[str], beside: dict[str, str], words: str, stage_one: Path
) -> None:
    with pytest.raises(SettingsError, match=words):
        run.plan(
            fused(stage_one, beside=beside, method={"name": "AdapterFusion", "members": method})
        )


def test_a_method_that_attends_to_nothing_has_nothing_beside_it(stage_one: Path) -> None:
    with pytest.raises(SettingsError, match=r'beside names "a", which LoRA has no use for'):
        run.plan(fused(stage_one, method={"name": "lora"}))
    with pytest.raises(SettingsError, match="is the run's own name"):
        run.plan(fused(stage_one, name="a"))


def test_directories_are_checked_before_any_work(stage_one: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    for given, words in (
        (tmp_path / "nowhere", r"beside\.a: no adapter directory at"),
        (stage_one / "bert", r"beside\.a: .*it holds a whole model, not an adapter"),
    ):
        with pytest.raises(FormatError, match=words):
            run.train(fused(stage_one, beside={"a": str(given)}, out=str(out)))
    assert not out.exists()


def test_an_adapter_for_another_base_is_refused_before_any_work(
    stage_one: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(stage_one / "a" / "adapter", tmp_path / "other"))
    own = json.loads((other / "graftune.json").read_text())
    own["base"]["sizes"]["hidden_size"] = 48
    (other / "graftune.json").write_text(json.dumps(own))
    with pytest.raises(BaseMismatchError, match=r"beside\.a: .* with hidden_size 48; this model"):
        run.plan(fused(stage_one, beside={"a": str(other)}))
