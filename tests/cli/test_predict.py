import json

TEXTS = ["where is my parcel", "i want my money now", "it hums at night again"]


def test_texts_get_labels(graftune, trained):
    out, _ = trained
    ended = graftune("predict", out, *TEXTS)
    assert ended.code == 0, ended.err
    lines = ended.out.splitlines()
    assert len(lines) == 1 + len(TEXTS)
    assert all(text in line for text, line in zip(TEXTS, lines[1:], strict=True))


def test_json_file_standard_input_and_adapter_directory_agree(graftune, trained, tmp_path):
    out, _ = trained
    known = graftune("predict", out, *TEXTS, "--json").json
    assert [one["text"] for one in known] == TEXTS
    piped = graftune("predict", out / "adapter", "--json", stdin="\n".join(TEXTS) + "\n\n").json
    data, answers = tmp_path / "new.jsonl", tmp_path / "deep" / "answers.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    ended = graftune("predict", out, "--data", data, "--out", answers)
    assert ended.code == 0, ended.err
    assert ended.out == f"3 answers in {answers}\n"
    written = [json.loads(line) for line in answers.read_text().splitlines()]
    assert known == piped == written
    assert [file.name for file in answers.parent.iterdir()] == ["answers.jsonl"]


def test_nothing_to_answer_and_too_much_are_errors(graftune, trained, rows):
    out, _ = trained
    assert "nothing to answer" in graftune("predict", out).err
    ended = graftune("predict", out, "a text", "--data", rows)
    assert ended.code == 2
    assert "one of the two" in ended.err


def test_a_folder_without_a_run_is_an_error(graftune, tmp_path):
    ended = graftune("predict", tmp_path, "text")
    assert ended.code == 2
    assert "graftune_task.json" in ended.err


def test_lowest_blocks_can_be_dropped(graftune, trained):
    out, _ = trained
    every = [graftune("predict", out, *TEXTS, "--json", "--drop", n) for n in (0, 1)]
    assert every[0].json == graftune("predict", out, *TEXTS, "--json").json
    assert every[1].json != every[0].json
    measured = graftune("evaluate", out, "--drop", "1", "--json")
    assert measured.code == 0, measured.err
    ended = graftune("predict", out, *TEXTS, "--drop", "99")
    assert ended.code == 2
    assert "drop is 99: drop leaves out the lowest 99 blocks" in ended.err
