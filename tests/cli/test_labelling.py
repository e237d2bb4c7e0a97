"""Labelling from the command line: trained, measured by type, and asked."""

from __future__ import annotations

import json

import pytest

from tests.tasks import tiny


@pytest.fixture(scope="module")
def labelled(graftune, tmp_path_factory):
    folder = tmp_path_factory.mktemp("labelled")
    base = tiny.bert(folder / "bert")
    data = tiny.write_jsonl(folder / "tagged.jsonl", tiny.tagged(60))
    out = folder / "run"
    ended = graftune(
        "train", "--base", base, "--task", "labelling", "--data", data, "--out", out,
        "--lr", "2e-2", "--epochs", 6, "--batch-size", 8,
    )  # fmt: skip
    assert ended.code == 0, ended.err
    return out, ended


def test_training_and_evaluation_show_each_type(graftune, labelled):
    out, ended = labelled
    for shown in (ended.out, graftune("evaluate", out).out):
        assert "entity F1" in shown
        rows = [line.split() for line in shown.splitlines()]
        assert {row[0] for row in rows if row} >= {"entities", "sum", "thing"}
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "<td>thing</td>" in page
    assert "too many for a matrix" not in page


def test_entities_are_shown_below_the_text(graftune, labelled):
    out, _ = labelled
    shown = graftune("predict", out, "where parcel the").out.splitlines()
    assert shown[0] == "> where parcel the"
    assert [line.split()[0] for line in shown[1:3]] == ["entity", "thing"]
    assert "no entities" in graftune("predict", out, "hello").out
    (found,) = graftune("predict", out, "where parcel the", "--json").json
    assert found["tags"] == ["O", "B-thing", "O"]


def test_an_adapter_of_it_merges_and_is_inspected(graftune, labelled, tmp_path):
    out, _ = labelled
    assert graftune("inspect", out / "adapter").code == 0
    ended = graftune("merge", out / "adapter", "--into", tmp_path / "merged")
    assert ended.code == 0, ended.err
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["architectures"] == ["BertForTokenClassification"]
    assert sorted(config["id2label"].values()) == ["B-sum", "B-thing", "I-sum", "I-thing", "O"]
