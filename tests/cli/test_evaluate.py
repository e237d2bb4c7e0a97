import json


def test_the_runs_own_test_rows_give_the_runs_metrics(graftune, trained):
    out, _ = trained
    known = json.loads((out / "result.json").read_text())
    found = graftune("evaluate", out, "--json").json
    assert found["metrics"]["accuracy"] == known["metrics"]["test"]["accuracy"]
    assert found["confusion"] == known["confusion"]


def test_other_rows_are_measured_and_shown(graftune, trained, rows):
    out, _ = trained
    ended = graftune("evaluate", out, "--data", rows)
    assert ended.code == 0, ended.err
    assert "accuracy" in ended.out
    assert "90 test rows" in ended.out


def test_an_unknown_split_is_an_error(graftune, trained):
    out, _ = trained
    ended = graftune("evaluate", out, "--split", "tset")
    assert ended.code == 2
    assert "tset" in ended.err


def test_several_adapters_vote_and_each_is_measured(graftune, trained, base, rows, tmp_path):
    out, _ = trained
    other = tmp_path / "other"
    graftune("train", "--base", base, "--data", rows, "--method", "prompttuning", "--steps", 2,
             "--set", "method.length=3", "--out", other, "--quiet", "--no-report")  # fmt: skip
    found = graftune("evaluate", out, "--with", other, "--vote", "mean", "--json").json
    assert [one["path"] for one in found["members"]] == [str(out), str(other)]
    known = json.loads((out / "result.json").read_text())["metrics"]["test"]
    assert found["members"][0]["metrics"]["accuracy"] == known["accuracy"]
    shown = graftune("evaluate", out, "--with", other)
    assert shown.code == 0, shown.err
    assert "vote" in shown.out
    ended = graftune("predict", out, "where is my parcel", "--with", other)
    assert ended.code == 0, ended.err
    assert "members" in ended.out
    ended = graftune("evaluate", out, "--vote", "mean")
    assert ended.code == 2
    assert "name the others (--with)" in ended.err
