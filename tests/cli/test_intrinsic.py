"""`graftune intrinsic` on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def searched(tmp_path_factory, graftune, base, rows):
    out = tmp_path_factory.mktemp("search") / "dims"
    words = ["intrinsic", "--base", base, "--data", rows, "--steps", 12, "--dims", "300,60",
             "--lr", "0.05,0.01", "--out", out, "--set", "method.targets=blocks",
             "--json", "--quiet"]  # fmt: skip
    return out, words, graftune(*words)


def test_it_trains_full_fine_tuning_and_each_d(searched) -> None:
    out, _, ended = searched
    assert ended.code == 0, ended.err
    assert [point["d"] for point in ended.json["points"]] == [60, 300]
    runs = sorted(path.name for path in out.iterdir() if path.is_dir())
    assert runs == ["d300-lr0_01", "d300-lr0_05", "d60-lr0_01", "d60-lr0_05", "full-lr5e-05"]
    full = json.loads((out / "full-lr5e-05" / "result.json").read_text())
    assert ended.json["reference"] == full["metrics"]["test"]["accuracy"]
    assert full["settings"]["train"]["head_start"] is False
    assert full["settings"]["train"]["lr"] == 5e-5
    for point in ended.json["points"]:
        run = json.loads((Path(point["run_dir"]) / "result.json").read_text())
        assert run["settings"]["method"] == {"name": "SAID", "targets": "blocks", "d": point["d"]}
        assert point["value"] == run["metrics"]["test"]["accuracy"]


def test_the_page_and_the_numbers_are_written(searched) -> None:
    out, _, ended = searched
    assert json.loads((out / "dimension.json").read_text())["points"] == ended.json["points"]
    assert "of full" in (out / "report.html").read_text()


def test_what_is_finished_is_not_done_again(searched, graftune) -> None:
    out, words, ended = searched
    made = {path: path.stat().st_mtime_ns for path in out.glob("*/result.json")}
    again = graftune(*words)
    assert again.json["points"] == ended.json["points"]
    assert made == {path: path.stat().st_mtime_ns for path in out.glob("*/result.json")}


def test_a_given_reference_spares_full_fine_tuning(graftune, base, rows, tmp_path) -> None:
    ended = graftune(
        "intrinsic", "--base", base, "--data", rows, "--steps", 2, "--dims", "100",
        "--reference", 0.2, "--out", tmp_path / "a", "--quiet",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    assert "d90 is at most 100" in ended.out
    assert not list((tmp_path / "a").glob("full*"))


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--dims", "ten"], '--dims takes whole numbers with commas between them, found "ten"'),
        (["--dims", "0"], "SAID: d is 0, expected at least 1"),
        (["--dims", "100000000"], "SAID: d is 100,000,000, but the targets have only"),
        (["--dims", "20"], "the 39 tensors' own scales take 39"),
        (["--lr", "0"], "a learning rate is above 0"),
        (["--share", "1.5"], "share is 1.5"),
        (["--set", "method.name=lora"], "the intrinsic dimension is SAID's d"),
        (["--set", "train.metric=loss"], "90% of a loss means nothing"),
        (["--set", "method.target=blocks"], 'Did you mean "targets"'),
    ],
)
def test_what_can_not_be_searched_is_told_before_anything_runs(
    flags, told, graftune, base, rows, tmp_path
) -> None:
    ended = graftune(
        "intrinsic", "--base", base, "--data", rows, "--steps", 2, "--out", tmp_path / "a",
        "--quiet", *flags,
    )  # fmt: skip
    assert ended.code == 2
    assert told in ended.err
    assert not list(tmp_path.glob("a/*"))
