"""Every Python block of the documentation runs, page by page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.project.pages import ROOT, blocks, run_python

DOCS = ROOT / "docs"
PAGES = sorted(page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md"))
WITH_PYTHON = [name for name in PAGES if blocks(DOCS / name, "python")]


@pytest.mark.parametrize("name", WITH_PYTHON)
def test_the_python_of_a_page_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run_python(DOCS / name)


@pytest.mark.parametrize("name", PAGES)
def test_the_links_of_a_page_lead_to_pages_that_exist(name: str) -> None:
    page = DOCS / name
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text("utf-8"))
    here = [link for link in links if "://" not in link]
    assert [link for link in here if not (page.parent / link).exists()] == []


def test_each_decision_is_at_most_a_page_and_is_listed() -> None:
    index = (DOCS / "decisions" / "index.md").read_text("utf-8")
    records = sorted((DOCS / "decisions").glob("[0-9]*.md"))
    assert records
    for record in records:
        text = record.read_text("utf-8")
        assert record.name in index
        assert len(text.splitlines()) <= 60, record.name
        assert re.search(r"^Status: (accepted|superseded by)", text, re.M), record.name
