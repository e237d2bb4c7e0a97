"""Whole runs on tiny models: everything that a run promises about its directory and its answers."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from graftune.errors import DataError, FormatError, SettingsError
from graftune.tasks import run
from graftune.tasks.result import RunResult, Silent
from graftune.tasks.settings import RunSettings
from tests.tasks import tiny


class Watch(Silent):
    def __init__(self) -> None:
        self.plans: list[dict[str, Any]] = []
        self.steps: list[dict[str, Any]] = []
        self.evaluations: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.ends: list[RunResult] = []

    def on_start(self, plan: dict[str, Any]) -> None:
        self.plans.append(plan)

    def on_step(self, state: dict[str, Any]) -> None:
        self.steps.append(state)

    def on_eval(self, metrics: dict[str, Any]) -> None:
        self.evaluations.append(metrics)

    def on_note(self, note: str) -> None:
        self.notes.append(note)

    def on_end(self, result: RunResult) -> None:
        self.ends.append(result)


def settings(folder: Path, **values: Any) -> RunSettings:
    base = folder / "bert"
    data = folder / "mail.jsonl"
    if not base.exists():
        tiny.bert(base)
        tiny.write_jsonl(data, tiny.mail(80))
    made = RunSettings(
        base=str(base), data=str(data), method="lora", out=str(folder / "run"),
        train={"epochs": 3, "lr": 1e-2, "batch_size": 8},
    )  # fmt: skip
    return made.replaced(**values)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunResult, Watch]:
    folder, watch = tmp_path_factory.mktemp("classification"), Watch()
    return folder, run.train(settings(folder), watch=watch), watch


def test_it_learns(finished: tuple[Path, RunResult, Watch]) -> None:
    assert finished[1].metrics["test"]["accuracy"] > 0.9
    assert finished[1].metrics["validation"].keys() >= {"accuracy", "macro_f1", "mcc", "loss"}


def test_the_directory_holds_the_run(finished: tuple[Path, RunResult, Watch]) -> None:
    folder, result, _ = finished
    names = {item.name for item in (folder / "run").iterdir()}
    assert names == {
        *("run.yaml", "env.json", "metrics.jsonl", "adapter", "checkpoints"),
        *("predictions.test.jsonl", "scores.test.jsonl", "result.json", "graftune_task.json"),
    }
    assert RunResult.load(folder / "run") == result
    log = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in log] == result.history
    assert result.adapter_bytes < result.base_bytes


def test_the_watcher_sees_the_run(finished: tuple[Path, RunResult, Watch]) -> None:
    _, result, watch = finished
    assert watch.plans[0]["total_steps"] == watch.steps[-1]["total"] == 3 * 7
    assert watch.plans[0]["parameters"]["trainable"] == result.parameters["trainable"]
    assert watch.steps[-1].keys() >= {"step", "loss", "lr", "seconds_left", "peak_memory_bytes"}
    assert [row["epoch"] for row in watch.evaluations] == [1, 2, 3]
    assert watch.ends == [result]
    assert any("held out" in note for note in watch.notes)


def test_confusion_and_predictions_agree(finished: tuple[Path, RunResult, Watch]) -> None:
    folder, result, _ = finished
    lines = (folder / "run" / "predictions.test.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    right = sum(row["label"] == row["true"] for row in rows)
    assert sum(result.confusion[i][i] for i in range(2)) == right
    assert sum(map(sum, result.confusion)) == len(rows) == result.data["rows"]["test"]


def test_a_fresh_process_predicts_the_same(finished: tuple[Path, RunResult, Watch]) -> None:
    folder, _, _ = finished
    lines = (folder / "run" / "predictions.test.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    code = (
        "import json, sys; from graftune.tasks.run import predict; "
        "print(json.dumps(predict(sys.argv[1], json.load(sys.stdin), 16)))"
    )
    for directory in (folder / "run", folder / "run" / "adapter"):
        done = subprocess.run(
            [sys.executable, "-c", code, str(directory)],
            input=json.dumps([row["text"] for row in rows]),
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        found = json.loads(done.stdout)
        assert found == [{k: v for k, v in row.items() if k != "true"} for row in rows]


def test_evaluation_gives_the_runs_own_figures(finished: tuple[Path, RunResult, Watch]) -> None:
    folder, result, _ = finished
    found = run.evaluate(folder / "run", batch_size=16)
    assert found["metrics"] == result.metrics["test"]
    assert found["confusion"] == result.confusion
    other = tiny.write_jsonl(folder / "other.jsonl", tiny.mail(10))
    assert run.evaluate(folder / "run", str(other))["rows"] == 10


def test_evaluation_refuses_what_it_does_not_know(
    finished: tuple[Path, RunResult, Watch], tmp_path: Path
) -> None:
    run_dir = finished[0] / "run"
    strange = tiny.write_jsonl(tmp_path / "a.jsonl", [{"text": "hello", "label": "refnud"}])
    with pytest.raises(DataError, match=r'"refnud" is not one.*Did you mean "refund"'):
        run.evaluate(run_dir, str(strange))
    with pytest.raises(DataError, match="has no dev split: it has train, validation, test"):
        run.evaluate(run_dir, split="dev")


def test_predictions_take_rows_of_the_trained_columns(
    finished: tuple[Path, RunResult, Watch],
) -> None:
    run_dir = finished[0] / "run"
    assert run.predict(run_dir, ["hello parcel"]) == run.predict(
        run_dir, [{"text": "hello parcel"}]
    )
    assert run.predict(run_dir, []) == []
    with pytest.raises(DataError, match="row 2: the text"):
        run.predict(run_dir, ["hello", " "])
    with pytest.raises(DataError, match="batch_size is 0"):
        run.predict(run_dir, ["hello"], 0)
    with pytest.raises(DataError, match="its head is new"):
        run.predict(run_dir, ["hello"], base_only=True)


def test_a_second_run_needs_another_place_or_a_word(
    finished: tuple[Path, RunResult, Watch],
) -> None:
    folder, result, _ = finished
    with pytest.raises(SettingsError, match="holds a run already"):
        run.train(settings(folder))
    again = run.train(RunSettings.from_yaml(folder / "run" / "run.yaml"), resume=True)
    assert again == result
    with pytest.raises(SettingsError, match=r"begun with train\.lr = 0\.01, not 0\.02"):
        run.train(settings(folder, train={"lr": 2e-2}), resume=True)


def test_an_interrupted_run_resumes_to_the_same_result(
    finished: tuple[Path, RunResult, Watch], tmp_path: Path
) -> None:
    folder, result, _ = finished
    made = settings(folder, out=str(tmp_path / "run"))

    class Interrupting(Silent):
        def on_eval(self, metrics: dict[str, Any]) -> None:
            if metrics["step"] == 14:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.train(made, watch=Interrupting())
    assert not (tmp_path / "run" / "result.json").exists()
    resumed = run.train(made, resume=True)
    assert resumed.history == result.history
    assert resumed.metrics == result.metrics
    assert resumed.confusion == result.confusion


def test_wrong_data_leaves_nothing_behind(tmp_path: Path) -> None:
    made = settings(tmp_path)
    tiny.write_jsonl(tmp_path / "mail.jsonl", [{"text": "a", "label": "x"}] * 3)
    with pytest.raises(DataError):
        run.train(made)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", ["bitfit", "full"])
def test_other_methods_run_alike(
    finished: tuple[Path, RunResult, Watch], tmp_path: Path, method: str
) -> None:
    made = settings(
        finished[0], out=str(tmp_path / "run"), method=method,
        data={"validation_fraction": 0}, train={"epochs": 1, "save_every": 0},
    )  # fmt: skip
    result = run.train(made)
    assert "validation" not in result.metrics
    rows = [json.loads(line) for line in (tmp_path / "run/predictions.test.jsonl").open()]
    found = run.predict(tmp_path / "run", [row["text"] for row in rows], 16)
    assert [one["score"] for one in found] == [row["score"] for row in rows]


def test_a_dry_run_reads_the_data_and_writes_nothing(tmp_path: Path) -> None:
    found = run.plan(settings(tmp_path))
    assert found["labels"] == ["delivery", "refund"]
    assert found["settings"]["train"]["lr"] == 1e-2
    assert found["total_steps"] == 21
    assert not (tmp_path / "run").exists()


def test_a_linear_probe_is_a_result_too(
    finished: tuple[Path, RunResult, Watch], tmp_path: Path
) -> None:
    result = run.linear_probe(settings(finished[0], out=str(tmp_path / "probe")))
    assert (result.kind, result.adapter_path) == ("probe", "")
    assert result.metrics["test"]["accuracy"] > 0.5
    assert result.parameters["trainable"] == 2 * 32 + 2
    assert RunResult.load(tmp_path / "probe") == result
    with pytest.raises(FormatError, match=r"has no graftune_task\.json"):
        run.predict(tmp_path / "probe", ["hello"])


def test_instructions_are_learnt_and_answered(tmp_path: Path) -> None:
    base = tiny.llama(tmp_path / "llama")
    data = tiny.write_jsonl(tmp_path / "lessons.jsonl", tiny.lessons())
    made = RunSettings(
        base=str(base), task="instruct", data=str(data), method="full", out=str(tmp_path / "run"),
        train={"epochs": 20, "lr": 1e-2, "batch_size": 8, "save_every": 0},
    )  # fmt: skip
    result = run.train(made)
    assert result.metrics["test"].keys() == {"perplexity", "token_accuracy"}
    rows = [json.loads(line) for line in (tmp_path / "run/predictions.test.jsonl").open()]
    assert {row["answer"] for row in rows} == {"hello yes good day"}
    assert rows[0]["messages"][-1]["role"] == "assistant"
    asked = [row["messages"] for row in rows]
    found = run.predict(tmp_path / "run", [{"messages": m} for m in asked], 16, max_new_tokens=64)
    assert [one["answer"] for one in found] == [row["answer"] for row in rows]
    asked = ["say where you"]
    before = run.predict(tmp_path / "run", asked, base_only=True, max_new_tokens=8)
    assert before[0]["answer"] != "hello yes good day"
    assert run.evaluate(tmp_path / "run", batch_size=16)["metrics"] == result.metrics["test"]


def test_a_logger_of_the_trainers_is_told_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import TrainerCallback
    from transformers.integrations import integration_utils

    logged: list[dict[str, float]] = []

    class Logger(TrainerCallback):
        def on_log(self, args: Any, *rest: Any, logs: Any = None, **settings: Any) -> None:
            logged.append({**logs, "run": args.run_name})

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "mlflow", Logger)
    monkeypatch.setattr(
        integration_utils, "get_available_reporting_integrations", lambda: ["mlflow"]
    )
    run.train(settings(tmp_path, train={"epochs": 1, "report_to": "mlflow"}, name="told"))
    assert any("loss" in row and row["run"] == "told" for row in logged)
    assert any("eval_accuracy" in row for row in logged)
