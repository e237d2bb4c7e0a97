"""Spans from the command line: SQuAD's file in, answers out, the report with both."""

from __future__ import annotations

import json

from tests.tasks import tiny


def test_a_squad_file_trains_and_is_asked(graftune, tmp_path):
    base, out, data = tiny.bert(tmp_path / "bert"), tmp_path / "run", tmp_path / "squad.json"
    asked = [
        {"context": row["context"], "qas": [{k: row[k] for k in ("question", "answers")}]}
        for row in tiny.passages(60)
    ]
    data.write_text(json.dumps({"version": "1.1", "data": [{"paragraphs": asked}]}))
    ended = graftune(
        "train", "--base", base, "--task", "spans", "--data", data, "--out", out, "--lr", "2e-2",
        "--epochs", 8, "--batch-size", 8, "--set", "task_options.longest=4",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    assert {"exact", "F1"} <= {line.split()[0] for line in ended.out.splitlines() if line}
    assert ended.out.rstrip().endswith(f"graftune predict {out} --data FILE")
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "<h3>what is it</h3>" in page
    assert "money back" in page
    rows = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.passages(2))
    shown = graftune("predict", out, "--data", rows)
    assert shown.out == "> what is it\nmoney back\n\n> what is it\nmoney back\n\n"
    refused = graftune("predict", out, "what is it")
    assert (refused.code, "a text alone" in refused.err) == (2, True)
