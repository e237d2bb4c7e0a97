import json
import re
from html.parser import HTMLParser

import pytest

from graftune.compare.report import render_report, write_report
from graftune.errors import SettingsError
from tests.compare.results import LABELS, confusion, predictions, result

VOID = {"meta", "link", "br", "img"}
"""HTML's elements without an end that the page uses; SVG's are closed by "/>"."""


class Checker(HTMLParser):
    """Reads a page, keeping its tags and every mistake in their nesting."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.mistakes: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.mistakes.append(f"</{tag}> at {self.getpos()}")

    def handle_data(self, data):
        self.text.append(data)


def check(page):
    reader = Checker()
    reader.feed(page)
    reader.close()
    assert not reader.mistakes
    assert not reader.open
    return reader


def full(**changes):
    run = result(**changes).to_dict()
    run["predictions"] = predictions(run["confusion"], run["labels"])
    return run


def several():
    return [
        result("probe", 0.8, history=[], kind="probe", adapter_bytes=0),
        result(),
        result("full", 0.93),
    ]


@pytest.mark.parametrize("make", [full, several], ids=["one", "several"])
def test_page_is_well_formed_and_asks_the_network_for_nothing(make):
    page = render_report(make())
    reader = check(page)
    assert page.startswith("<!DOCTYPE html>")
    assert not re.search(r"(?:https?:)?//[a-z0-9.-]+\.[a-z]{2,}", page)
    loads = [attrs for tag, attrs in reader.tags if "src" in attrs or tag in ("iframe", "object")]
    assert loads == []
    assert {attrs["href"] for tag, attrs in reader.tags if tag == "link"} == {"data:,"}
    assert len(page.encode()) < 500_000


def test_page_works_in_both_themes_on_paper_and_on_a_phone():
    page = render_report(full())
    assert "prefers-color-scheme: dark" in page
    assert "@media print" in page
    assert 'name="viewport"' in page


def test_each_curve_has_a_mark_for_each_logged_point():
    reader = check(render_report(full()))
    counts = [int(attrs["data-points"]) for tag, attrs in reader.tags if tag == "g"]
    assert counts == [59, 10, 10, 10, 59, 59]
    assert sum(1 for tag, _ in reader.tags if tag == "circle") == sum(counts)


def test_nasty_labels_and_texts_are_escaped():
    nasty = [
        "</script><script>alert(1)</script>",
        '"><img src=x onerror=alert(1)>',
        "{{ 7*7 }}&amp;",
    ]
    run = result(labels=nasty, confusion=confusion(0.5, nasty), name="<i>mine</i>").to_dict()
    run["predictions"] = [{"text": "<b onclick='x'>", "true": nasty[0], "label": nasty[1]}]
    run["notes"] = ["<u>note</u>"]
    reader = check(render_report([run, run]))
    tags = [tag for tag, _ in reader.tags]
    assert tags.count("script") == 1
    assert not {"img", "b", "u"} & set(tags) - {"b"}
    assert all(not any(key.startswith("on") for key in attrs) for _, attrs in reader.tags)
    assert nasty[2] in "".join(reader.text)


def test_first_line_says_the_score_its_interval_and_the_trained_share():
    heading = re.search(r"<h1>(.*?)</h1>", render_report(full())).group(1)
    assert re.fullmatch(
        r"LoRA: \d\d\.\d\s% \(\d\d\.\d–\d\d\.\d\s%\) accuracy on 270 test rows, "
        r"1\.3\s% of the parameters trained",
        heading,
    )


def test_comparison_opens_the_best_run_and_shows_every_one():
    page = render_report(several())
    assert re.search(r"<h1>full is best", page)
    assert re.findall(r'<details class="run"( open)?><summary>(\w+)', page) == [
        ("", "probe"), ("", "LoRA"), (" open", "full"),
    ]  # fmt: skip
    assert "All measured on the same 270 test rows" in page


def test_page_holds_matrix_classes_settings_versions_data_and_the_command():
    text = " ".join("".join(check(render_report(full())).text).split())
    for expected in [*LABELS, "train.lr", "0.001", "2.13.0", "944", "301,071", "22,713,216",
                     "graftune train runs/LoRA/run.yaml --out runs/LoRA-again"]:  # fmt: skip
        assert expected in text


def test_generated_answers_are_shown_before_and_after():
    run = result(labels=[], confusion=[], metrics={"test": {"perplexity": 3.2}}).to_dict()
    run["predictions"] = [
        {"instruction": "Hi?", "before": "Hello", "answer": "Ahoy!", "expected": "Ahoy!"}
    ]
    text = "".join(check(render_report(run)).text)
    assert text.index("Hi?") < text.index("Hello") < text.index("Ahoy!")
    assert "3.2 perplexity" in text


def test_a_run_with_next_to_nothing_still_gives_a_page():
    bare = result(
        history=[], metrics={}, confusion=[], labels=[], parameters={}, data={}, versions={}
    )
    assert "not yet measured" in render_report(bare)


def test_many_classes_leave_the_matrix_out_and_keep_the_page_small():
    labels = [f"class-{i}" for i in range(150)]
    page = render_report(result(labels=labels, confusion=confusion(0.9, labels)))
    assert "too many for a matrix" in page
    assert len(page.encode()) < 500_000


def test_a_long_run_keeps_the_page_small():
    long = [{"step": i, "loss": 1.0, "lr": 1e-3, "grad_norm": 1.0} for i in range(1, 50_001)]
    assert len(render_report(result(history=long)).encode()) < 500_000


def test_written_file_replaces_the_old_one_whole(tmp_path):
    path = tmp_path / "deep" / "report.html"
    assert write_report(result(), path) == path
    write_report(several(), path)
    assert "Each run" in path.read_text(encoding="utf-8")
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]


def test_rows_are_read_from_the_run_directory(tmp_path):
    run = result(run_dir=str(tmp_path))
    rows = predictions(run.confusion, LABELS)
    (tmp_path / "predictions.test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert "message 0 of privacy" in render_report(run)


def test_what_is_no_result_is_refused():
    with pytest.raises(SettingsError, match="empty list"):
        render_report([])
    with pytest.raises(SettingsError, match="given int"):
        render_report(3)
