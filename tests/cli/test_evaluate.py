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
