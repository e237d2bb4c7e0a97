"""Prompts on the command line: the same commands as for adapters, and the comparison with one."""

import json

import pytest

from tests.tasks import tiny


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    tiny.llama(folder / "llama")
    tiny.write_jsonl(folder / "mail.jsonl", tiny.mail(60))
    return folder


@pytest.fixture(scope="module")
def adapter(place, graftune):
    ended = graftune(
        "train", "--base", place / "llama", "--data", place / "mail.jsonl", "--steps", 3,
        "--out", place / "lora", "--quiet", "--no-report",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    return place / "lora"


@pytest.fixture(scope="module")
def prompted(place, graftune, adapter):
    ended = graftune(
        "train", "--base", place / "llama", "--data", place / "mail.jsonl",
        "--method", "in-context", "--shots", 4, "--out", place / "run", "--against", adapter,
    )  # fmt: skip
    return place / "run", ended


def test_an_adapters_run_keeps_what_it_took(adapter):
    costs = json.loads((adapter / "result.json").read_text())["costs"]
    assert costs["rows"] == 12
    assert costs["tokens"] > 12
    assert costs["seconds"] > 0
    assert costs["start_seconds"] > 0


def test_a_run_says_its_costs_and_writes_its_report(prompted):
    out, ended = prompted
    assert ended.code == 0, ended.err
    for said in ("accuracy", "prediction", "without sharing", "cost", "predict"):
        assert said in ended.out
    assert "4 demonstrations, 12 predictions" in ended.err
    assert "loss" not in ended.err
    found = json.loads((out / "result.json").read_text())
    assert found["kind"] == "in-context"
    assert found["against"]["name"] == "classification-lora"
    assert "Wall time by predictions" in (out / "report.html").read_text()


def test_evaluate_and_predict_take_it_as_an_adapters_run(prompted, graftune):
    out, _ = prompted
    metrics = json.loads((out / "result.json").read_text())["metrics"]["test"]
    assert graftune("evaluate", out, "--json").json["metrics"] == metrics
    (answer,) = graftune("predict", out, "where is my parcel", "--json").json
    assert answer["label"] in ("delivery", "refund")
    assert graftune("predict", out, "where is my parcel", "--base-only").code == 0


def test_a_dry_run_prints_the_prompt(place, graftune):
    ended = graftune(
        "train", "--base", place / "llama", "--data", place / "mail.jsonl", "--dry-run",
        "--method", "in-context", "--shots", 1,
    )  # fmt: skip
    assert "The first question's prompt:\n\nText: " in ended.out


def test_its_settings_are_explained(graftune):
    assert "in-context" in graftune("methods").out
    ended = graftune("methods", "InContext")
    for said in ("shots = 8", 'separator = "\\n\\n"', "one of random, balanced, nearest"):
        assert said in ended.out
    assert all(one["doc"] for one in graftune("methods", "in-context", "--json").json["settings"])


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--method", "lora", "--shots", 4], 'LoRA has no setting "shots"'),
        (["--method", "in-context", "--epochs", 2], "in-context learning trains nothing"),
        (["--method", "in-context", "--shots", 500], "there are only 42 training rows"),
        (["--method", "in-context", "--against", "nowhere"], "no finished run"),
    ],
)
def test_what_cannot_be_ends_with_one_line(flags, told, place, graftune, tmp_path):
    ended = graftune(
        "train", "--base", place / "llama", "--data", place / "mail.jsonl",
        "--out", tmp_path / "run", *flags,
    )  # fmt: skip
    assert ended.code == 2
    assert told in ended.err
    assert not (tmp_path / "run").exists()


def test_a_run_without_costs_cannot_be_compared_with(place, prompted, graftune, tmp_path):
    out, _ = prompted
    found = json.loads((out / "result.json").read_text())
    (tmp_path / "result.json").write_text(json.dumps({**found, "costs": {}}))
    ended = graftune(
        "train", "--base", place / "llama", "--data", place / "mail.jsonl",
        "--method", "in-context", "--out", tmp_path / "run", "--against", tmp_path,
    )  # fmt: skip
    assert "doesn't say how long its training and its predictions took" in ended.err
