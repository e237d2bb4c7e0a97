"""`graftune plan`: a table, JSON, and a file that train reads."""

from __future__ import annotations

import json

import pytest

from graftune.tasks.settings import RunSettings
from tests.planning.models import BERT, VIT


@pytest.fixture
def bert(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(BERT))
    return tmp_path


def test_the_table_has_the_parts_and_the_peak(graftune, bert):
    ended = graftune("plan", "--base", bert, "--length", 32)
    assert ended.code == 0, ended.err
    for word in ("weights", "activations", "peak", "TFLOP", "adapter", "LoRA"):
        assert word in ended.out


def test_json_is_alone_on_standard_output(graftune, bert):
    found = graftune("plan", "--base", bert, "--length", 32, "--json").json
    assert found["peak_bytes"] == sum(found["parts"].values())
    assert found["settings"]["length"] == 32


def test_the_file_of_a_fit_is_one_that_train_reads(graftune, bert, tmp_path):
    out = tmp_path / "run.yaml"
    ended = graftune(
        "plan", "--base", bert, "--length", 64, "--fit", "60MiB", "--data", "mail.csv",
        "--set", "method.r=4", "--out", out,
    )  # fmt: skip
    assert ended.code == 0, ended.err
    settings = RunSettings.from_yaml(out)
    assert settings.method == {"name": "LoRA", "r": 4}
    assert settings.data.max_length == 64
    assert settings.train.accumulation * (settings.train.batch_size or 0) == 8
    again = graftune("plan", out, "--json")
    assert again.json["peak_bytes"] <= 60 * 2**20


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "needs a base model"),
        (("--fit", "8"), "no unit"),
        (("--out", "x.yaml"), "--data FILE"),
        (("--set", "train.lr=1"), "here it sets the method"),
        (("--method", "lorra"), 'Did you mean "LoRA"'),
    ],
)
def test_bad_input_is_refused_with_the_way_on(graftune, bert, tmp_path, arguments, said):
    base = ("--base", bert) if arguments else ()
    ended = graftune("plan", *base, *arguments)
    assert ended.code == 2
    assert said in ended.err
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


def test_a_file_for_train_needs_a_task_that_train_has(graftune, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(VIT))
    ended = graftune("plan", "--base", tmp_path, "--data", "images", "--out", tmp_path / "run.yaml")
    assert ended.code == 2
    assert "no task for image-classification" in ended.err
