"""`graftune data`: what it prints, and how it ends."""


def test_all_parts_are_shown(graftune, base, rows):
    ended = graftune("data", rows, "--base", base, "--max-length", 8)
    assert ended.code == 0, ended.err
    for said in ("classification (told from the columns)", "parcel", "tokens p99", "over 8", "█"):
        assert said in ended.out


def test_json_is_alone_and_without_a_base_has_no_lengths(graftune, rows):
    ended = graftune("data", rows, "--json")
    assert (ended.code, ended.err) == (0, "")
    assert ended.json["task"] == "classification"
    assert ended.json["histogram"] == []
    assert sum(ended.json["data"]["rows"].values()) == 90


def test_data_that_training_refuses_is_shown_and_ends_with_2(graftune, tmp_path):
    path = tmp_path / "mail.csv"
    path.write_text("text,label\n" + "".join(f"t{n},{n % 2}\n" for n in range(40)) + "x\n,0\n")
    ended = graftune("data", path)
    assert ended.code == 2
    assert "2 train rows can't be used" in ended.out
    assert f"{path}:42: this row has 1 fields" in ended.out
    assert graftune("data", path, "--json").json["problems"] != []
    assert graftune("data", path, "--skip-bad").code == 0


def test_a_settings_file_says_task_base_and_data(graftune, base, rows, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(f"base: {base}\ndata: {{train: {rows}, max_length: 8}}\n")
    ended = graftune("data", file, "--json")
    assert ended.code == 0, ended.err
    assert (ended.json["guessed"], ended.json["data"]["max_length"]) == (False, 8)


def test_a_missing_file_and_a_wrong_task_are_one_sentence(graftune, rows, tmp_path):
    for words, said in (
        ([tmp_path / "none.csv"], "There is no file"),
        ([rows, "--task", "labeling"], 'Did you mean "labelling"'),
        ([rows, "--label", "lable"], '"lable"'),
    ):
        ended = graftune("data", *words)
        assert ended.code == 2
        assert said in ended.err
