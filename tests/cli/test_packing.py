"""Packing from the command line: fewer rows, the same answers, and a task that can't."""

import json

from tests.tasks import tiny


def test_a_packed_run_takes_fewer_steps_and_answers(graftune, tmp_path):
    tiny.llama(tmp_path / "llama", width=64)
    tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.lessons(24))
    words = ["train", "--base", tmp_path / "llama", "--data", tmp_path / "rows.jsonl"]
    words += ["--task", "instruct", "--method", "lora", "--lr", 0.02, "--batch-size", 1]
    words += ["--set", "train.packing=true", "--out", tmp_path / "run", "--set", "train.epochs=30"]
    ended = graftune(*words, "--max-length", 96)
    assert ended.code == 0, ended.err
    assert "conversations were packed into" in ended.out + ended.err
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["metrics"]["test"]["token_accuracy"] == 1
    assert result["history"][-1]["step"] <= 30 * 17 / 3  # of 17 conversations, 3 or more a row
    answer = graftune("predict", tmp_path / "run", "say where is", "--max-new-tokens", 8, "--json")
    assert answer.code == 0, answer.err


def test_a_task_that_cannot_pack_says_so(graftune, tmp_path):
    rows = [{"text": f"row {at}", "label": "ab"[at % 2]} for at in range(20)]
    tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    ended = graftune(
        "train", "--base", "demo:minilm", "--data", tmp_path / "rows.jsonl", "--dry-run",
        "--set", "train.packing=true",
    )  # fmt: skip
    assert ended.code
    assert "classification can't put several examples into one row" in ended.err
