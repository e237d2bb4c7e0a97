import json

import pytest

from graftune.cli.train import settings_from
from graftune.errors import SettingsError
from graftune.tasks.settings import RunSettings


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "base: demo:minilm\ndata:\n  train: mail.csv\nmethod:\n  name: LoRA\n  r: 4\n"
        "train:\n  lr: 1e-4\n"
    )
    return path


def test_flags_change_what_the_file_says_and_set_changes_both(file):
    settings = settings_from(file, {"train.lr": 1e-3, "base": None}, ["train.lr=5e-3", "name=x"])
    assert (settings.base, settings.train.lr, settings.name) == ("demo:minilm", 5e-3, "x")


def test_the_same_method_keeps_the_files_settings_another_drops_them(file):
    assert settings_from(file, {"method": "lora"}, []).method == {"name": "LoRA", "r": 4}
    assert settings_from(file, {"method": "bitfit"}, []).method == {"name": "bitfit"}
    assert settings_from(file, {"method": "lora", "method.r": 2}, []).method["r"] == 2


def test_flags_alone_make_settings():
    flags = {"base": "b", "data.train": "d.csv", "method": "lora", "method.r": 8}
    assert settings_from(None, flags, []).method == {"name": "lora", "r": 8}


@pytest.mark.parametrize(
    ("flags", "changes", "said"),
    [
        ({}, [], "needs a base model and data"),
        ({"base": "b", "data.train": "d", "train.lr": -1.0}, [], "--lr: train.lr"),
        ({"base": "b", "data.train": "d", "train.batch_size": 0}, [], "--batch-size"),
        ({"base": "b", "data.train": "d"}, ["train.lrr=1"], 'Did you mean "lr"'),
        ({"base": "b", "data.train": "d"}, ["lr"], "key=value"),
    ],
)
def test_wrong_settings_name_the_flag(flags, changes, said):
    with pytest.raises(SettingsError, match=said):
        settings_from(None, flags, changes)


def test_wrong_settings_in_a_file_name_the_line(file):
    file.write_text(file.read_text() + "  epoch: 3\n")
    with pytest.raises(SettingsError, match=r'run.yaml:9.*train.epoch.*"epochs"'):
        settings_from(file, {}, [])


def test_a_run_ends_with_its_metrics_files_and_next_command(trained):
    out, ended = trained
    assert ended.code == 0, ended.err
    for said in ("accuracy", "trained", "adapter", f'graftune predict {out} "', "report.html"):
        assert said in ended.out
    for name in ("run.yaml", "result.json", "report.html", "adapter/adapter_config.json"):
        assert (out / name).is_file()
    assert "rate" in ended.err
    assert "steps" in ended.err
    assert "<svg" in (out / "report.html").read_text()


def test_the_resolved_settings_make_the_same_run_again(trained):
    out, _ = trained
    settings = RunSettings.from_yaml(out / "run.yaml")
    assert settings_from(out / "run.yaml", {}, []) == settings


def test_a_finished_run_is_not_overwritten_unasked(graftune, trained):
    out, _ = trained
    ended = graftune("train", out / "run.yaml")
    assert ended.code == 2
    assert ended.err.count("\n") == 1
    assert "run already" in ended.err


def test_resume_of_a_finished_run_gives_its_result(graftune, trained):
    out, _ = trained
    ended = graftune("train", out / "run.yaml", "--resume", "--json", "--quiet")
    assert ended.code == 0, ended.err
    assert ended.err == ""
    assert ended.json["run_dir"] == str(out)
    assert ended.json["report"] == str(out / "report.html")


def test_dry_run_prints_settings_and_data_and_writes_nothing(graftune, base, rows, tmp_path):
    out = tmp_path / "none"
    words = ["train", "--base", base, "--data", rows, "--out", out, "--dry-run"]
    ended = graftune(*words)
    assert ended.code == 0, ended.err
    assert "lr: 0.001" in ended.out
    assert not out.exists()
    assert graftune(*words, "--json").json["settings"]["base"] == str(base)
    assert not out.exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--method", "lorra"], 'Did you mean "LoRA"'),
        (["--method", "lora", "--r", "0"], "r is 0"),
        (["--label", "lable"], '"lable"'),
        (["--data", "nowhere.csv"], "nowhere.csv"),
        (["--base", "./no-such-model"], "no-such-model"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(graftune, base, rows, tmp_path, change, said):
    out = tmp_path / "run"
    words = {"--base": base, "--data": rows, "--out": out}
    words |= dict(zip(change[::2], change[1::2], strict=True))
    ended = graftune("train", *(word for pair in words.items() for word in pair), "--quiet")
    assert ended.code == 2
    assert said in ended.err
    assert "Traceback" not in ended.err
    assert ended.err.startswith("error: ")
    assert not (out / "adapter").exists()


def test_ctrl_c_says_the_next_command(graftune, base, rows, tmp_path, monkeypatch):
    out = tmp_path / "run"

    def interrupted(settings, **_):
        (settings.run_dir / "checkpoints" / "checkpoint-2").mkdir(parents=True)
        raise KeyboardInterrupt

    monkeypatch.setattr("graftune.tasks.run.train", interrupted)
    ended = graftune("train", "--base", base, "--data", rows, "--out", out)
    assert ended.code == 130
    assert f"graftune train {out / 'run.yaml'} --resume" in ended.err


def test_ctrl_c_before_a_checkpoint_says_so(graftune, base, rows, tmp_path, monkeypatch):
    def interrupted(settings, **_):
        raise KeyboardInterrupt

    monkeypatch.setattr("graftune.tasks.run.train", interrupted)
    ended = graftune("train", "--base", base, "--data", rows, "--out", tmp_path / "run")
    assert ended.code == 130
    assert "nothing is kept" in ended.err


def test_json_is_alone_on_standard_output(graftune, base, rows, tmp_path):
    ended = graftune(
        "train", "--base", base, "--data", rows, "--steps", 3, "--method", "bitfit",
        "--out", tmp_path / "run", "--json", "--no-report",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    result = json.loads(ended.out)
    assert result["report"] is None
    assert result["metrics"]["test"]["accuracy"] >= 0
    assert not (tmp_path / "run" / "report.html").exists()


def test_the_schema_knows_every_key_of_a_settings_file(graftune):
    ended = graftune("train", "--schema")
    assert (ended.code, ended.err) == (0, "")
    assert set(ended.json["properties"]) == set(RunSettings.model_fields)
    assert "skip_bad" in ended.json["$defs"]["DataSettings"]["properties"]
    assert ended.json["additionalProperties"] is False


def test_seeds_and_a_searched_rate_make_runs_and_a_table(graftune, base, rows, tmp_path):
    words = [
        "train", "--base", base, "--data", rows, "--method", "bitfit", "--steps", 3,
        "--out", tmp_path / "run", "--seeds", 2, "--lr", "search",
    ]  # fmt: skip
    ended = graftune(*words)
    assert ended.code == 0, ended.err
    assert "mean ± sd" in ended.out
    assert "seed 1" in ended.out
    assert "the best accuracy on the validation data after 3 steps each" in ended.err
    again = graftune(*words, "--resume", "--json", "--quiet")
    assert again.code == 0, again.err
    assert len(again.json["runs"]) == 2
    assert again.json["metrics"]["test"]["accuracy"]["sd"] >= 0
    assert {path.name for path in tmp_path.iterdir()} == {"run-seed0", "run-seed1"}


def test_a_rate_that_is_no_number_names_its_flag(graftune, base, rows):
    ended = graftune("train", "--base", base, "--data", rows, "--lr", "high")
    assert ended.code == 2
    assert "--lr: train.lr" in ended.err
